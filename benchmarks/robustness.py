"""Measure how much the error depends on the settings, and on the strengths of two other methods, at equal compression.

Each setting is multiplied by 0.1 to 10; the size of the initial m by 0.316 to 3.16. LeNet-300-100 at 80× has a third of
its epochs. Rows go to ``results/robustness.csv``:

    python benchmarks/robustness.py --data-dir DIR --seeds 0 1 2
"""

from __future__ import annotations

import json
from pathlib import Path

from accuracy import execute_missing, make_parser
from harness.report import markdown_table, save_picture, sweep_picture
from harness.results import Run, group_means, read_rows
from harness.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "robustness.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "robustness.png"
FACTORS = (0.1, 0.316, 1.0, 3.16, 10.0)
# method, option, value at the factor 1, factors
SWEEPS = (
    ("autoprune", "pressure", 0.05, FACTORS),
    ("autoprune", "auxiliary_lr", 30.0, FACTORS),
    ("autoprune", "initial_scale", 0.1, (0.316, 1.0, 3.16)),
    ("vardrop", "strength", 0.5, FACTORS),
    ("spred", "strength", 3e-4, FACTORS),
)


def scaled_option(option: str, value: float, factor: float) -> str:
    """Return the options, as JSON, with one option multiplied by a factor."""
    return json.dumps({option: float(f"{value * factor:.3g}")})


def main() -> None:
    parser = make_parser(__doc__, RESULTS, PICTURE)
    parser.set_defaults(tasks=["lenet-300-100"])
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    args = parser.parse_args()
    runs = [
        Run(task, method, args.target, args.epochs or TASKS[task].third, seed, scaled_option(option, value, factor))
        for task in args.tasks
        for seed in args.seeds
        for method, option, value, factors in SWEEPS
        for factor in factors
    ]
    execute_missing(list(dict.fromkeys(runs)), args.results, args.data_dir)
    rows = read_rows(args.results)
    for task in args.tasks:
        found = group_means([row for row in rows if row["task"] == task], TASKS[task].metric, ("method", "options"))
        sweeps = [
            (method, option, [(factor, found[method, scaled_option(option, value, factor)]) for factor in factors])
            for method, option, value, factors in SWEEPS
        ]
        lines = []
        for method, option, points in sweeps:
            values = [mean.mean for _, mean in points]
            name = f"{method}: `{option}` × {points[0][0]:g} to {points[-1][0]:g}"
            lines.append([name, " ".join(f"{v:.2f}" for v in values), f"{max(values) - min(values):.2f}"])
        print(markdown_table([task, f"{TASKS[task].metric} along the sweep", "largest − smallest"], lines))
        save_picture(sweep_picture(sweeps, TASKS[task].metric), args.picture)


if __name__ == "__main__":
    main()
