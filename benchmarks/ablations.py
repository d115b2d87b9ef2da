"""Measure what each part of the method contributes: one change of the default at a time.

LeNet-300-100, the ResNet and the transformer have a third of their epochs, and runs are paired by seed. Rows go to
``results/ablations.csv``:

    python benchmarks/ablations.py --data-dir DIR --tasks lenet-300-100 --seeds 0 1 2
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accuracy import execute_missing, make_parser
from harness.report import change_picture, markdown_table, save_picture
from harness.results import Run, group_means, read_rows
from harness.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "ablations.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "ablations.png"
TARGETS = {"lenet-300-100": 120.0, "transformer": 30.0, "resnet": 30.0, "tabular": 30.0, "lenet-5": 310.0}
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "the paper's rule (dL/dT · sgn w)": {"update_rule": "autoprune"},
    "plain chain rule": {"update_rule": "vanilla"},
    "estimator leaky ReLU": {"estimator": "leaky_relu"},
    "estimator softplus": {"estimator": "softplus"},
    "estimator hard sigmoid": {"estimator": "hard_sigmoid"},
    "constant initial m": {"initial_m": "constant"},
    "an eighth of each batch held out": {"held_out": 0.125},
    "half of each batch held out": {"held_out": 0.5},
    "held-out gradients alone": {"train_gradients": False},
    "held-out gradients alone, half of each batch": {"held_out": 0.5, "train_gradients": False},
    "a sixth of the rows held out, fixed": {"held_out": 0.1667, "redraw_held_out": False},
    "half of the rows held out, fixed (1:1)": {"held_out": 0.5, "redraw_held_out": False},
    "nothing held out": {"held_out": "train"},
    "M stepped every 4th step": {"mask_every_n_steps": 4},
    "M stepped every 16th step": {"mask_every_n_steps": 16},
    "mean squares over 1000 steps": {"memory": 1000},
    "cubic path": {"schedule": "cubic"},
    "path with the power 8": {"power": 8},
    "dense start of 10%": {"warmup": 0.1},
    "dense start of 40%": {"warmup": 0.4},
    "frozen for 20% of the run": {"finetune": 0.2},
    "frozen for 50% of the run": {"finetune": 0.5},
    "regrowth before the masks freeze": {"regrowth": 0.2},
    "distilled from the dense phase": {"distillation": 1.0},
    "BatchNorm re-estimated": {"batchnorm": True},
}


def main() -> None:
    parser = make_parser(__doc__, RESULTS, PICTURE)
    parser.set_defaults(tasks=["lenet-300-100", "resnet", "transformer"])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    args = parser.parse_args()
    runs = [
        Run(task, "variant", TARGETS[task], args.epochs or TASKS[task].third, seed, json.dumps(CHANGES[name]))
        for task in args.tasks
        for seed in args.seeds
        for name in args.changes
        if "batchnorm" not in CHANGES[name] or task == "resnet"
    ]
    execute_missing(runs, args.results, args.data_dir)
    rows, names = read_rows(args.results), {json.dumps(options): name for name, options in CHANGES.items()}
    for task in args.tasks:
        found = group_means([row for row in rows if row["task"] == task], TASKS[task].metric, ("options",))
        named = {names[key]: mean for (key,), mean in found.items() if key in names}
        base = named["default"]
        lines = ([n, f"{m.mean:.3f} ± {m.spread:.3f}", f"{m.mean - base.mean:+.3f}"] for n, m in named.items())
        print(markdown_table([f"{task}, {TARGETS[task]:g}×", TASKS[task].metric, "change"], lines))
    save_picture(change_picture(rows, args.tasks, names), args.picture)


if __name__ == "__main__":
    main()
