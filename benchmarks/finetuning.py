"""Prune networks that are trained already, in few steps: error at equal steps and sparsity, for each method.

Each network is trained dense first, once per seed, and stored in ``--cache``; all methods start with its weights. Then
Adam trains it for 60 to 2,000 more steps, while the method prunes it. The rows of the method ``dense`` are the network
as it was trained (0 steps), and trained on without pruning. Runs that have a row in ``results/finetuning.csv`` are
skipped, so the benchmark can be stopped at any time, and several processes may work on different tasks or seeds:

    python benchmarks/finetuning.py --data-dir DIR
    python benchmarks/finetuning.py --data-dir DIR --tasks bert --methods dense autoprune gmp --steps 60 200 --seeds 0

The settings of the other methods are the best of their trials at 90% and the nearest number of steps, on training
samples that are kept out of all training. The trials' rows are in ``results/finetuning_trials.csv``:

    python benchmarks/finetuning.py --data-dir DIR --trials --tasks cluttered-lenet-300-100 --seeds 10 \\
        --steps 60 200 600 --sparsities 0.9
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
    FINETUNING_LABELS,
    FINETUNING_METHODS,
    TRIALS_RESULTS,
    FinetuningRun,
    best_settings,
    finetune_and_test,
    load_or_train_dense,
)
from harness.finetuning_tasks import FINETUNING_TASKS
from harness.report import finetuning_picture, finetuning_table, save_picture
from harness.results import append_row, missing_runs, read_rows
from harness.training import silence

RESULTS = Path(__file__).parent / "results" / "finetuning.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "finetuning.png"
CACHE = Path(tempfile.gettempdir()) / "lightning-autoprune-benchmarks"
STEPS = (60, 200, 600, 2000)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)

PHASES: list[dict[str, Any]] = [
    {"begin": 0.05, "end": 0.45},
    {"begin": 0.05, "end": 0.65},
    {"begin": 0.25, "end": 0.65},
]
TRIALS: dict[str, list[dict[str, Any]]] = {
    "lightning": PHASES,
    "gmp": PHASES,
    "hyperflux": [{**phases, "speed": speed} for phases in PHASES for speed in (2.0, 5.0, 10.0, 20.0, 40.0)],
}


def list_runs(args: argparse.Namespace) -> list[FinetuningRun]:
    """Return the runs that the arguments ask for, in the order in which they are executed."""
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            for steps in (0, *args.steps):
                for method in args.methods:
                    if method == "dense" and not args.trials:
                        runs.append(FinetuningRun(task, method, None, steps, seed))
                    elif method != "dense" and steps:
                        settings = TRIALS.get(method, []) if args.trials else [best_settings(method, steps)]
                        runs += [
                            FinetuningRun(task, method, target, steps, seed, json.dumps(options))
                            for target in args.sparsities
                            for options in settings
                        ]
    return list(dict.fromkeys(runs))


def execute_missing(runs: list[FinetuningRun], args: argparse.Namespace) -> None:
    """Execute and print the runs that have no row in the file."""
    silence()

    @functools.lru_cache(1)
    def load_dense(task: str, seed: int) -> Any:
        return load_or_train_dense(FINETUNING_TASKS[task], seed, args.data_dir, args.cache, validate=args.trials)

    for i, run in enumerate(runs, 1):
        if not missing_runs(args.results, [run]):
            continue
        task = FINETUNING_TASKS[run.task]
        data = task.data(args.data_dir)
        if args.trials:
            data = data.without_test_set()
        compression = None if run.target is None else 1 / (1 - run.target)
        method = FINETUNING_METHODS[run.method](compression, run.seed, run.steps, **json.loads(run.options))
        outcome = finetune_and_test(task, load_dense(run.task, run.seed), method, run.steps, run.seed, data)
        figures = {name: "" if figure is None else figure for name, figure in asdict(outcome).items()}
        append_row(args.results, {**run.cells(), **figures})
        shown = f"error {outcome.error:.2f}%, loss {outcome.loss:.4f}, sparsity {outcome.sparsity:.2%}"
        print(f"[{i}/{len(runs)}]", *run.cells().values(), "→", shown, f"{outcome.seconds:.1f} s", flush=True)


def has_current_settings(row: dict[str, str]) -> bool:
    """Return True if a run had the settings that its method has now."""
    return bool(json.loads(row["options"]) == best_settings(row["method"], int(row["steps"])))


def make_table(rows: list[dict[str, str]], task: str) -> str:
    """Return the table of a task, over the rows with the current settings of their methods."""
    return finetuning_table(
        [row for row in rows if has_current_settings(row)], FINETUNING_TASKS[task], FINETUNING_LABELS
    )


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
    parser.add_argument(
        "--trials", action="store_true", help="try settings of the other methods, without the test samples"
    )
    parser.add_argument("--results", type=Path, help="CSV file to which rows are appended")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="PNG file to write")
    args = parser.parse_args()
    args.results = args.results or (TRIALS_RESULTS if args.trials else RESULTS)
    execute_missing(list_runs(args), args)
    if args.trials:
        return
    rows = read_rows(args.results)
    for task in args.tasks:
        print("\n" + make_table(rows, task))
    tasks = [FINETUNING_TASKS[task] for task in args.tasks]
    rows = [row for row in rows if has_current_settings(row)]
    save_picture(finetuning_picture(rows, tasks, FINETUNING_LABELS, "0.9"), args.picture)


if __name__ == "__main__":
    main()
