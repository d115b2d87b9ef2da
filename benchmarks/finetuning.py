"""Prune networks that are trained already, in few steps: error at equal steps and sparsity, for each method.

Each network is trained dense first, once per seed, and stored in ``--cache``; all methods start with its weights. Then
Adam trains it for 60 to 2,000 more steps, while the method prunes it. The rows of the method ``dense`` are the network
as it was trained (0 steps), and trained on without pruning. Runs that have a row in ``results/finetuning.csv`` are
skipped, so the benchmark can be stopped at any time, and several processes may work on different tasks or seeds:

    python benchmarks/finetuning.py --data-dir DIR
    python benchmarks/finetuning.py --data-dir DIR --tasks bert --methods dense autoprune gmp --steps 60 200 --seeds 0
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.finetuning import (
    FINETUNING_METHODS,
    FinetuningRun,
    finetune_and_test,
    load_or_train_dense,
)
from harness.finetuning_tasks import FINETUNING_TASKS
from harness.results import append_row, missing_runs
from harness.training import silence

RESULTS = Path(__file__).parent / "results" / "finetuning.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "finetuning.png"
CACHE = Path(tempfile.gettempdir()) / "lightning-autoprune-benchmarks"
STEPS = (60, 200, 600, 2000)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SETTINGS: dict[str, dict[str, Any]] = {}


def list_runs(args: argparse.Namespace) -> list[FinetuningRun]:
    """Return the runs that the arguments ask for, in the order in which they are executed."""
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            for steps in (0, *args.steps):
                for method in args.methods:
                    if method == "dense":
                        runs.append(FinetuningRun(task, method, None, steps, seed))
                    elif steps:
                        options = args.options or json.dumps(SETTINGS.get(method, {}))
                        runs += [
                            FinetuningRun(task, method, target, steps, seed, options) for target in args.sparsities
                        ]
    return list(dict.fromkeys(runs))


def execute_missing(runs: list[FinetuningRun], args: argparse.Namespace) -> None:
    """Execute and print the runs that have no row in the file."""
    silence()
    load = functools.lru_cache(1)(
        lambda task, seed: load_or_train_dense(task, seed, args.data_dir, args.cache, args.validate)
    )
    for i, run in enumerate(runs, 1):
        if not missing_runs(args.results, [run]):
            continue
        task = FINETUNING_TASKS[run.task]
        data = task.data(args.data_dir)
        if args.validate:
            data = data.without_test_set()
        compression = None if run.target is None else 1 / (1 - run.target)
        method = FINETUNING_METHODS[run.method](compression, run.seed, run.steps, **json.loads(run.options))
        outcome = finetune_and_test(task, load(task, run.seed), method, run.steps, run.seed, data)
        figures = {name: "" if figure is None else figure for name, figure in asdict(outcome).items()}
        append_row(args.results, {**run.cells(), **figures})
        shown = f"error {outcome.error:.2f}%, loss {outcome.loss:.4f}, sparsity {outcome.sparsity:.2%}"
        print(f"[{i}/{len(runs)}]", *run.cells().values(), "→", shown, f"{outcome.seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="directory of MNIST's IDX files")
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="directory of the dense networks (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=FINETUNING_TASKS, default=list(FINETUNING_TASKS))
    parser.add_argument("--methods", nargs="+", choices=FINETUNING_METHODS, default=list(FINETUNING_METHODS))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="fractions of weights to prune")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--options", help="of the methods, as JSON; default: their settings")
    parser.add_argument("--validate", action="store_true", help="test on training samples kept out of training")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV file to which rows are appended")
    args = parser.parse_args()
    execute_missing(list_runs(args), args)


if __name__ == "__main__":
    main()
