"""The settings of each peer: six to eleven trials, on training rows kept from training; the test rows are not seen.

LeNet-300-100 at 80×, a third of the epochs; the others at 30×, half of the epochs (the tabular network: all). The
results are made with the best of them (``harness/methods/settings.py``). Ours has six trials too, on LeNet-300-100, but
its defaults were chosen on runs of all networks:

    python benchmarks/tuning.py --data-dir DIR
    python benchmarks/tuning.py --data-dir DIR --tasks resnet transformer --target 30 --epochs 3
    python benchmarks/tuning.py --data-dir DIR --tasks tabular --target 30 --epochs 60 --seeds 10 11 12

How far L0, variational dropout, spred and NNCF get depends on a strength: they have trials at the other compressions
too, LeNet-300-100 at 20×, 50×, 120× and 200×, the others at 10× and 100×, by commands such as:

    python benchmarks/tuning.py --data-dir DIR --target 200 --methods l0 vardrop spred nncf
    python benchmarks/tuning.py --data-dir DIR --tasks resnet transformer --target 10 --epochs 3 \\
        --methods l0 vardrop spred nncf
    python benchmarks/tuning.py --data-dir DIR --tasks tabular --target 10 --epochs 60 --seeds 10 11 12 \\
        --methods l0 vardrop spred nncf

What a strength does depends on the length of a run, so on LeNet-300-100 at 80×, 120× and 200× the best three are tried
once more with all epochs (L0 at 200×: all of them):

    python benchmarks/tuning.py --data-dir DIR --target 80 --methods l0 vardrop spred --epochs 38 --best 3

ModelPruning prunes at the ends of epochs, so it has all those of a run:

    python benchmarks/tuning.py --data-dir DIR --tasks resnet --target 30 --epochs 5 --methods lightning
    python benchmarks/tuning.py --data-dir DIR --tasks transformer --target 30 --epochs 6 --methods lightning
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from accuracy import arguments, carry_out
from harness.methods.settings import TRIALS as RESULTS
from harness.report import cell, markdown
from harness.results import Run, means, read
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

# The other networks have a few hundred to a few thousand steps.
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


def chosen(task: str, method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings to try: all, or those that did best in shorter trials at this compression."""
    trials = (TRIALS if task.startswith("lenet") else SHORT_TRIALS).get(method, [])
    if not args.best:
        return trials
    wanted, target = [json.dumps(options) for options in trials], f"{args.target:g}"
    rows = [r for r in read(args.results) if (r["task"], r["method"], r["target"]) == (task, method, target)]
    rows = [r for r in rows if r["options"] in wanted and int(r["epochs"]) < args.epochs]
    found = means(rows, TASKS[task].metric, ("options",))
    best = sorted(found, key=lambda key: found[key].mean)[: args.best]
    return [json.loads(options) for (options,) in best]


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    parser.set_defaults(tasks=["lenet-300-100"], seeds=[10], epochs=12)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    parser.add_argument("--best", type=int, help="only so many settings: those that did best in shorter trials")
    args = parser.parse_args()
    runs = [
        Run(task, method, args.target, args.epochs, seed, json.dumps(options))
        for task in args.tasks
        for method in args.methods
        for options in chosen(task, method, args)
        for seed in args.seeds
    ]
    carry_out(runs, args.results, args.data_dir, validate=True)
    rows = read(args.results)
    for task in args.tasks:
        metric = TASKS[task].metric
        found = means([row for row in rows if row["task"] == task], metric, ("method", "target", "epochs", "options"))
        lines = ([*key, cell(mean, metric)] for key, mean in found.items())
        print(markdown([task, "compression", "epochs", "options", metric], lines))


if __name__ == "__main__":
    main()
