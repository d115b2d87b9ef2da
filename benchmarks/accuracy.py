"""Compare all methods: error against compression, on the same network, data, optimizer and epochs.

Each run adds a row to ``results/accuracy.csv``. Runs that have a row are skipped, so the benchmark can be stopped at
any time, and several processes may work on different tasks or seeds:

    python benchmarks/accuracy.py --data-dir DIR --tasks tabular --methods dense autoprune gmp --seeds 0 1 2

``--readme-picture`` also draws the README's picture, from all rows in the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from harness.methods import LABELS, METHODS
from harness.methods.settings import best_settings
from harness.report import compression_picture, compression_table, no_target_table, readme_picture, save_picture
from harness.results import Run, append_outcome, missing_runs, read_rows
from harness.tasks import DEFAULT_TASKS, TASKS
from harness.training import Hardware, silence, train_and_test

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
DOCS = Path(__file__).parents[1] / "docs"
PICTURE, README_PICTURE = DOCS / "accuracy.png", DOCS / "readme_accuracy.png"


def make_parser(
    description: str | None, results: Path, picture: Path | None = None, tasks: Iterable[str] = DEFAULT_TASKS
) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the benchmarks share; ``tasks`` are those that may be named."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data/mnist"), help="default: MNIST's directory")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(DEFAULT_TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="default: the task's")
    parser.add_argument("--results", type=Path, default=results, help="CSV file to which rows are appended")
    if picture:
        parser.add_argument("--picture", type=Path, default=picture, help="PNG file to write")
    return parser


def add_hardware_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a benchmark that may also run on a GPU."""
    parser.add_argument("--accelerator", default="cpu", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--precision", default="32-true", choices=["32-true", "16-mixed", "bf16-mixed"])
    parser.add_argument("--workers", type=int, default=0, help="processes that load images that are not in memory")


def chosen_hardware(args: argparse.Namespace) -> Hardware:
    """Return what the arguments of :func:`add_hardware_arguments` ask for."""
    return Hardware(args.accelerator, args.precision, args.workers)


def execute_missing(
    runs: list[Run],
    results: Path,
    data_dir: Path,
    validate: bool = False,
    hardware: Hardware = Hardware(),  # noqa: B008
) -> None:
    """Execute and print the runs that have no row in the file.

    Args:
        runs: all runs that are wanted.
        results: the file.
        data_dir: directory of the data.
        validate: whether to test on training samples that were kept out of training, for choosing settings.
        hardware: where and how to train.
    """
    silence()
    for i, run in enumerate(runs, 1):
        if not missing_runs(results, [run]):
            continue
        task = TASKS[run.task]
        method = METHODS[run.method](run.target, run.seed, **json.loads(run.options))
        outcome = train_and_test(task, method, run.seed, data_dir, run.epochs, validate, hardware)
        append_outcome(results, run, outcome)
        figures = f"error {outcome.error:.2f}%, loss {outcome.loss:.4f}, {outcome.compression:.1f}×"
        print(f"[{i}/{len(runs)}]", *run.cells().values(), "→", figures, f"{outcome.seconds:.0f} s", flush=True)


def has_current_settings(row: dict[str, str]) -> bool:
    """Return True if a run had the settings that its method has now."""
    target = float(row["target"]) if row["target"] else None
    return json.loads(row["options"]) == best_settings(row["task"], row["method"], target)


def main() -> None:
    parser = make_parser(__doc__, RESULTS, PICTURE, TASKS)
    add_hardware_arguments(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", *LABELS])
    parser.add_argument("--compressions", nargs="+", help="default: the task's; none: no target")
    parser.add_argument("--options", help="of the methods, as JSON; default: their best settings")
    parser.add_argument(
        "--readme-picture", type=Path, nargs="?", const=README_PICTURE, help="also draw the README's picture"
    )
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        for task in (TASKS[name] for name in args.tasks):
            for method in args.methods:
                for text in args.compressions or task.compressions:
                    compression = None if method == "dense" or text == "none" else float(text)
                    options = args.options or json.dumps(best_settings(task.name, method, compression))
                    runs.append(Run(task.name, method, compression, args.epochs or task.epochs, seed, options))
    execute_missing(list(dict.fromkeys(runs)), args.results, args.data_dir, hardware=chosen_hardware(args))
    rows = [row for row in read_rows(args.results) if has_current_settings(row)]
    for name in args.tasks:
        print("\n" + compression_table(rows, name, LABELS))
    print("\n" + no_target_table(rows))
    save_picture(compression_picture(rows, args.tasks, LABELS), args.picture)
    if args.readme_picture:
        save_picture(readme_picture(rows, LABELS), args.readme_picture)


if __name__ == "__main__":
    main()
