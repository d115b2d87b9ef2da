"""How much the result depends on the settings: each swept at equal compression, beside the strengths of two peers.

All over a factor of 100, but for the size of the initial m, over 10.

LeNet-300-100 at 80×, a third of the epochs. Rows go to ``results/robustness.csv``:

    python benchmarks/robustness.py --data-dir DIR --seeds 0 1 2
"""

from __future__ import annotations

import json
from pathlib import Path

from accuracy import arguments, carry_out
from harness.report import markdown, save, sweep_picture
from harness.results import Run, means, read
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


def changed(option: str, value: float, factor: float) -> str:
    """The options, as JSON, with one multiplied by a factor."""
    return json.dumps({option: float(f"{value * factor:.3g}")})


def main() -> None:
    parser = arguments(__doc__, RESULTS, PICTURE)
    parser.set_defaults(tasks=["lenet-300-100"])
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    args = parser.parse_args()
    runs = [
        Run(task, method, args.target, args.epochs or TASKS[task].third, seed, changed(option, value, factor))
        for task in args.tasks
        for seed in args.seeds
        for method, option, value, factors in SWEEPS
        for factor in factors
    ]
    carry_out(list(dict.fromkeys(runs)), args.results, args.data_dir)
    rows = read(args.results)
    for task in args.tasks:
        found = means([row for row in rows if row["task"] == task], TASKS[task].metric, ("method", "options"))
        sweeps = [
            (method, option, [(factor, found[method, changed(option, value, factor)]) for factor in factors])
            for method, option, value, factors in SWEEPS
        ]
        lines = []
        for method, option, points in sweeps:
            values = [mean.mean for _, mean in points]
            name = f"{method}: `{option}` × {points[0][0]:g} to {points[-1][0]:g}"
            lines.append([name, " ".join(f"{v:.2f}" for v in values), f"{max(values) - min(values):.2f}"])
        print(markdown([task, f"{TASKS[task].metric} along the sweep", "largest − least"], lines))
        save(sweep_picture(sweeps, TASKS[task].metric), args.picture)


if __name__ == "__main__":
    main()
