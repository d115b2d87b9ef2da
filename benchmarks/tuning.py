"""The settings of each method: a few trials each, on training rows kept from training; the test rows are not seen.

LeNet-300-100, 80×, a third of the epochs. The best of each goes into ``harness/methods`` and holds for all tasks:

    python benchmarks/tuning.py --data-dir DIR
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accuracy import arguments, carry_out
from harness.report import cell, markdown
from harness.results import Run, means, read

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
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
    "l0": [{"end": end, "strength": strength} for end in (0.55, 0.66) for strength in (0.3, 1.0, 3.0)],
    "vardrop": [{"end": end, "strength": strength} for end in (0.55, 0.66) for strength in (0.5, 1.0, 2.0)],
    "spred": [{"end": end, "strength": strength} for end in (0.55, 0.66) for strength in (3e-5, 1e-4, 3e-4)],
    "nncf": [{"end": end, "mask_lr": lr} for end in (0.55, 0.66) for lr in (0.02, 0.05, 0.1)],
}


def main() -> None:
    parser = arguments(__doc__, RESULTS)
    parser.set_defaults(tasks=["lenet-300-100"], seeds=[10], epochs=12)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--target", type=float, default=80.0, help="compression")
    args = parser.parse_args()
    runs = [
        Run(task, method, args.target, args.epochs, seed, json.dumps(options))
        for task in args.tasks
        for method in args.methods
        for options in TRIALS[method]
        for seed in args.seeds
    ]
    carry_out(runs, args.results, args.data_dir, validate=True)
    found = means(read(args.results), "error", ("task", "method", "options"))
    lines = ([*key, cell(mean, "error")] for key, mean in found.items())
    print(markdown(["task", "method", "options", "error, %"], lines))


if __name__ == "__main__":
    main()
