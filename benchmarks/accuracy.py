"""Error against compression of every method, at the same network, data, optimizer and epochs.

One row a run goes to ``results/accuracy.csv``; runs that are there are skipped, so it can be stopped at any time and
several may run at once, on other tasks or seeds:

    python benchmarks/accuracy.py --data-dir DIR --tasks tabular --methods dense autoprune gmp --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.methods import LABELS, METHODS
from harness.methods.settings import settings
from harness.report import compression_picture, compression_table, no_target_table, save
from harness.results import Run, append, missing, read
from harness.tasks import TASKS
from harness.training import quiet, train

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "accuracy.png"


def arguments(description: str | None, results: Path, picture: Path | None = None) -> argparse.ArgumentParser:
    """The arguments that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="directory of MNIST's IDX files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="in place of the task's")
    parser.add_argument("--results", type=Path, default=results)
    if picture:
        parser.add_argument("--picture", type=Path, default=picture)
    return parser


def carry_out(runs: list[Run], results: Path, data_dir: Path, validate: bool = False) -> None:
    """Carries out the runs that the file does not have, and shows each; ``validate``: without the test rows."""
    quiet()
    for i, run in enumerate(runs, 1):
        if not missing(results, [run]):
            continue
        task = TASKS[run.task]
        method = METHODS[run.method](run.target, run.seed, **json.loads(run.options))
        outcome = train(task, method, run.seed, data_dir, run.epochs, validate)
        append(results, run, outcome)
        figures = f"error {outcome.error:.2f}%, loss {outcome.loss:.4f}, {outcome.compression:.1f}×"
        print(f"[{i}/{len(runs)}]", *run.key().values(), "→", figures, f"{outcome.seconds:.0f} s", flush=True)


def at_its_settings(row: dict[str, str]) -> bool:
    """Whether a run had the settings that its method has now."""
    target = float(row["target"]) if row["target"] else None
    return json.loads(row["options"]) == settings(row["task"], row["method"], target)


def main() -> None:
    parser = arguments(__doc__, RESULTS, PICTURE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", *LABELS])
    parser.add_argument("--compressions", nargs="+", help="in place of the task's; none: no target")
    parser.add_argument("--options", help="of the methods, as JSON, in place of their settings")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        for task in (TASKS[name] for name in args.tasks):
            for method in args.methods:
                for text in args.compressions or task.compressions:
                    compression = None if method == "dense" or text == "none" else float(text)
                    options = args.options or json.dumps(settings(task.name, method, compression))
                    runs.append(Run(task.name, method, compression, args.epochs or task.epochs, seed, options))
    carry_out(list(dict.fromkeys(runs)), args.results, args.data_dir)
    rows = [row for row in read(args.results) if at_its_settings(row)]
    for name in args.tasks:
        print("\n" + compression_table(rows, name, LABELS))
    print("\n" + no_target_table(rows))
    save(compression_picture(rows, args.tasks, LABELS), args.picture)


if __name__ == "__main__":
    main()
