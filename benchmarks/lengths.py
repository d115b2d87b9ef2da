"""Measure how the error of a pruned network falls with the length of the run, beside the dense network's.

LeNet-300-100 at 80× has 38, 114 and 380 epochs; LeNet-5 at 310× and 500× has 38, 76, 152 and 300. The other methods are
the two best ones at 38 epochs, with the settings that they have there. Rows go to ``results/lengths.csv``:

    python benchmarks/lengths.py --data-dir DIR --tasks lenet-300-100 --seeds 0
    python benchmarks/lengths.py --data-dir DIR --tasks lenet-5 --seeds 0 --epochs 152
"""

from __future__ import annotations

import json
from pathlib import Path

from accuracy import execute_missing, make_parser
from harness.methods import LABELS
from harness.methods.settings import best_settings
from harness.report import length_picture, length_table, save_picture
from harness.results import Run, read_rows

RESULTS = Path(__file__).parent / "results" / "lengths.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "lengths.png"
METHODS = ("autoprune", "hyperflux", "vardrop")
LABELS_HERE = {"dense": "not pruned", **{method: LABELS[method] for method in METHODS}}
COMPRESSIONS = {"lenet-300-100": (80.0,), "lenet-5": (310.0, 500.0)}
EPOCHS = {"lenet-300-100": (38, 114, 380), "lenet-5": (38, 76, 152, 300)}


def list_runs(tasks: list[str], methods: list[str], seeds: list[int], epochs: int | None = None) -> list[Run]:
    """Return all runs, the shortest ones of each task first.

    Args:
        tasks: names of the tasks.
        methods: names of the methods.
        seeds: one run of each kind per seed.
        epochs: the length of all runs; None: each length of the task.
    """
    return [
        Run(task, method, compression, length, seed, json.dumps(best_settings(task, method, compression)))
        for task in tasks
        for length in ([epochs] if epochs else EPOCHS[task])
        for seed in seeds
        for method in methods
        for compression in ((None,) if method == "dense" else COMPRESSIONS[task])
    ]


def main() -> None:
    parser = make_parser(__doc__, RESULTS, PICTURE, tasks=EPOCHS)
    parser.set_defaults(tasks=list(EPOCHS))
    parser.add_argument("--methods", nargs="+", choices=LABELS_HERE, default=list(LABELS_HERE))
    args = parser.parse_args()
    execute_missing(list_runs(args.tasks, args.methods, args.seeds, args.epochs), args.results, args.data_dir)
    rows = read_rows(args.results)
    for task in args.tasks:
        print("\n" + length_table(rows, task, LABELS_HERE))
    save_picture(length_picture(rows, args.tasks, LABELS_HERE), args.picture)


if __name__ == "__main__":
    main()
