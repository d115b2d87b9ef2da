"""Run the AutoPrune paper's own setting with each of its estimators, beside this package's default without a target.

LeNet-300-100 and LeNet-5 have a third of their epochs. What the paper states, and what it leaves open, is in
``harness/methods/paper.py``. Rows go to ``results/paper.csv``:

    python benchmarks/paper.py --data-dir DIR --tasks lenet-300-100 --seeds 0
"""

from __future__ import annotations

import json
from pathlib import Path

from accuracy import add_hardware_arguments, chosen_hardware, execute_missing, make_parser
from harness.report import UNITS, format_mean, markdown_table
from harness.results import Run, group_means, read_rows
from harness.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "paper.csv"
ESTIMATORS = ("linear", "hard_sigmoid", "leaky_relu", "softplus")
SETTINGS = {
    "dense": ("dense", "{}"),
    "default, no target": ("autoprune", "{}"),
    **{f"paper, `{name}`": ("paper", json.dumps({"estimator": name})) for name in ESTIMATORS},
}
"""Method and options, as JSON, by the name in the table."""


def result_table(rows: list[dict[str, str]], task: str) -> str:
    """Return a table with a line per setting and number of epochs, means over the seeds; "" without a row."""
    rows, metric = [row for row in rows if row["task"] == task], TASKS[task].metric
    figures = (metric, "compression", "passes")
    found = {figure: group_means(rows, figure, ("method", "options", "epochs")) for figure in figures}
    lines = [
        [
            name,
            epochs,
            str(len(mean.values)),
            format_mean(mean, metric),
            f"{found['compression'][method, options, epochs].mean:.1f}×",
            f"{found['passes'][method, options, epochs].mean:.2f}",
        ]
        for name, setting in SETTINGS.items()
        for (method, options, epochs), mean in sorted(found[metric].items(), key=lambda item: int(item[0][2]))
        if (method, options) == setting
    ]
    head = [f"{task}: setting", "epochs", "seeds", UNITS[metric], "compression", "samples passed, dense = 1"]
    return markdown_table(head, lines) if lines else ""


def main() -> None:
    parser = make_parser(__doc__, RESULTS, tasks=TASKS)
    add_hardware_arguments(parser)
    parser.set_defaults(tasks=["lenet-300-100", "lenet-5"])
    args = parser.parse_args()
    runs = [
        Run(task, method, None, args.epochs or TASKS[task].third, seed, options)
        for task in args.tasks
        for seed in args.seeds
        for method, options in SETTINGS.values()
    ]
    execute_missing(runs, args.results, args.data_dir, hardware=chosen_hardware(args))
    for task in args.tasks:
        print("\n" + result_table(read_rows(args.results), task))


if __name__ == "__main__":
    main()
