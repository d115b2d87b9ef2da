"""How much the result depends on the settings: each swept over a factor of 100 at equal compression, beside two peers.

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
    ("vardrop", "strength", 1.0, FACTORS),
    ("spred", "strength", 1e-4, FACTORS),
)


def main() -> None:
    parser = arguments(__doc__, RESULTS, PICTURE)
    parser.set_defaults(tasks=["lenet-300-100"])
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    args = parser.parse_args()
    runs = []
    for task in args.tasks:
        epochs = args.epochs or -(-TASKS[task].epochs // 3)
        for seed in args.seeds:
            for method, option, value, factors in SWEEPS:
                for factor in factors:
                    text = json.dumps({option: float(f"{value * factor:.3g}")})
                    runs.append(Run(task, method, args.target, epochs, seed, text))
    carry_out(list(dict.fromkeys(runs)), args.results, args.data_dir)
    rows = read(args.results)
    for task in args.tasks:
        found = means([row for row in rows if row["task"] == task], TASKS[task].metric, ("method", "options"))
        lines = []
        for method, option, value, factors in SWEEPS:
            keys = [json.dumps({option: float(f"{value * factor:.3g}")}) for factor in factors]
            values = [found[method, key].mean for key in keys if (method, key) in found]
            if values:
                cells = [f"{v:.2f}" for v in values]
                lines.append(
                    [
                        f"{method}: `{option}` × {factors[0]:g} to {factors[-1]:g}",
                        " ".join(cells),
                        f"{max(values) - min(values):.2f}",
                    ]
                )
        print(markdown([task, f"{TASKS[task].metric} along the sweep", "largest − least"], lines))
        save(sweep_picture(found, SWEEPS, TASKS[task].metric), args.picture)


if __name__ == "__main__":
    main()
