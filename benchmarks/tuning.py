"""Choose the settings of each other method: six to eleven trials, tested on samples kept out of the training set.

No trial sees the test samples. LeNet-300-100 has trials at 80× with a third of its epochs; the other networks have
trials at 30× with half of their epochs, the tabular network with all. The results use the best of them
(``harness/methods/settings.py``). AutoPrune has six trials too, on LeNet-300-100, but its defaults were chosen on runs
of all networks:

    python benchmarks/tuning.py --data-dir DIR
    python benchmarks/tuning.py --data-dir DIR --tasks resnet transformer --target 30 --epochs 3
    python benchmarks/tuning.py --data-dir DIR --tasks tabular --target 30 --epochs 60 --seeds 10 11 12

The best strength of L0, variational dropout, spred and NNCF depends on the compression. They have trials at the other
compressions too: LeNet-300-100 at 20×, 50×, 120× and 200×, the other networks at 10× and 100×, by commands such as:

    python benchmarks/tuning.py --data-dir DIR --target 200 --methods l0 vardrop spred nncf
    python benchmarks/tuning.py --data-dir DIR --tasks resnet transformer --target 10 --epochs 3 \\
        --methods l0 vardrop spred nncf
    python benchmarks/tuning.py --data-dir DIR --tasks tabular --target 10 --epochs 60 --seeds 10 11 12 \\
        --methods l0 vardrop spred nncf

The best strength also depends on the length of the run. On LeNet-300-100 at 80×, 120× and 200× the best three settings
are therefore tried again with all epochs (for L0 at 200×, all settings):

    python benchmarks/tuning.py --data-dir DIR --target 80 --methods l0 vardrop spred --epochs 38 --best 3

ModelPruning prunes at the ends of epochs, so its trials have all epochs of a run:

    python benchmarks/tuning.py --data-dir DIR --tasks resnet --target 30 --epochs 5 --methods lightning
    python benchmarks/tuning.py --data-dir DIR --tasks transformer --target 30 --epochs 6 --methods lightning
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from accuracy import execute_missing, make_parser
from harness.methods.settings import TRIALS as RESULTS
from harness.report import format_mean, markdown_table
from harness.results import Run, group_means, read_rows
from harness.tasks import TASKS

TRIALS: dict[str, list[dict[str, Any]]] = {
    "autoprune": [
        {"auxiliary_lr": lr, "update_rule": rule} for lr in (10.0, 30.0, 100.0) for rule in ("adaptive", "autoprune")
    ],
    "autoprune-train": [
        {"auxiliary_lr": lr, "update_rule": rule} for lr in (10.0, 30.0, 100.0) for rule in ("adaptive", "autoprune")
    ],
    "gmp": [{"begin": begin, "end": end} for begin in (0.05, 0.13) for end in (0.45, 0.55, 0.66)],
    "lightning": [{"begin": begin, "end": end} for begin in (0.05, 0.13) for end in (0.45, 0.55, 0.66)],
    "rigl": [{"every": every, "fraction": part} for every in (20, 50, 100) for part in (0.3, 0.5)],
    "set": [{"every": every, "fraction": part} for every in (20, 50, 100) for part in (0.3, 0.5)],
    "hyperflux": [{"end": end, "speed": speed} for end in (0.55, 0.66) for speed in (10.0, 20.0, 40.0)],
    "l0": [
        *({"end": 0.55, "strength": strength} for strength in (0.3, 1.0, 3.0, 10.0, 30.0)),
        *({"gate_lr": 0.1, "strength": strength} for strength in (0.3, 1.0, 3.0, 10.0, 30.0)),
    ],
    "vardrop": [{"end": 0.55, "strength": strength} for strength in (0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)],
    "spred": [{"end": 0.55, "strength": strength} for strength in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)],
    "nncf": [{"mask_lr": lr, "ramp": ramp} for lr in (0.02, 0.05, 0.1) for ramp in (0.2, 0.4)],
}

# For the other networks, whose runs have a few hundred to a few thousand steps.
SHORT_TRIALS: dict[str, list[dict[str, Any]]] = {
    "gmp": [{"begin": begin, "end": end, "every": 10} for begin in (0.05, 0.15, 0.25) for end in (0.45, 0.66)],
    "lightning": [{"begin": begin, "end": end} for begin in (0.05, 0.15, 0.25) for end in (0.3, 0.66)],
    "rigl": [{"every": every, "fraction": part} for every in (10, 30, 100) for part in (0.3, 0.5)],
    "set": [{"every": every, "fraction": part} for every in (10, 30, 100) for part in (0.3, 0.5)],
    "hyperflux": [{"end": end, "speed": speed} for end in (0.55, 0.66) for speed in (20.0, 40.0, 80.0)],
    "l0": [
        *({"gate_lr": lr, "strength": strength} for lr in (0.01, 0.1) for strength in (0.1, 1.0, 10.0, 100.0)),
        *({"gate_lr": 0.1, "strength": strength} for strength in (0.3, 3.0, 30.0)),
    ],
    "vardrop": [{"noise_lr": lr, "strength": strength} for lr in (0.01, 0.1) for strength in (0.1, 1.0, 10.0)],
    "spred": [{"strength": strength} for strength in (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)],
    "nncf": [{"mask_lr": lr, "ramp": ramp} for lr in (0.02, 0.05, 0.1, 0.2) for ramp in (0.3, 0.5)],
}


def select_trials(task: str, method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the settings to try: all, or the best of the shorter trials at this compression."""
    trials = (TRIALS if task.startswith("lenet") else SHORT_TRIALS).get(method, [])
    if not args.best:
        return trials
    wanted, target = [json.dumps(options) for options in trials], f"{args.target:g}"
    rows = [r for r in read_rows(args.results) if (r["task"], r["method"], r["target"]) == (task, method, target)]
    rows = [r for r in rows if r["options"] in wanted and int(r["epochs"]) < args.epochs]
    found = group_means(rows, TASKS[task].metric, ("options",))
    best = sorted(found, key=lambda key: found[key].mean)[: args.best]
    return [json.loads(options) for (options,) in best]


def main() -> None:
    parser = make_parser(__doc__, RESULTS)
    parser.set_defaults(tasks=["lenet-300-100"], seeds=[10], epochs=12)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    parser.add_argument("--best", type=int, help="try only this many settings: the best of the shorter trials")
    args = parser.parse_args()
    runs = [
        Run(task, method, args.target, args.epochs, seed, json.dumps(options))
        for task in args.tasks
        for method in args.methods
        for options in select_trials(task, method, args)
        for seed in args.seeds
    ]
    execute_missing(runs, args.results, args.data_dir, validate=True)
    rows = read_rows(args.results)
    for task in args.tasks:
        metric = TASKS[task].metric
        found = group_means(
            [row for row in rows if row["task"] == task], metric, ("method", "target", "epochs", "options")
        )
        lines = ([*key, format_mean(mean, metric)] for key, mean in found.items())
        print(markdown_table([task, "compression", "epochs", "options", metric], lines))


if __name__ == "__main__":
    main()
