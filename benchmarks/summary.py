"""The README's table from the rows of ``accuracy.py``: mean and spread over the seeds.

python benchmarks/summary.py
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

from accuracy import RESULTS

NAMES = {
    "dense": "dense",
    "0.5": "`held_out=0.5` (default): half of each batch",
    "train": '`held_out="train"`: nothing held out',
    "fixed-0.1667": "`held_out=0.1667, redraw_held_out=False`: 10,000 fixed rows",
    "loader": "`held_out=DataLoader(...)` over the training set, not held out",
}
# Samples passed forward and backward, against dense training: the pruning phase is 53% of the run
PASSES = {"dense": 1.0, "0.5": 1.0, "train": 1.0, "fixed-0.1667": (1 + 0.53) * (1 - 0.1667), "loader": 1.53}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    with parser.parse_args().results.open() as file:
        for row in csv.DictReader(file):
            groups[row["network"], row["target"], row["method"]].append(row)
    print("| network | target | M is trained on | passes | compression | error, mean (each seed) |")
    print("|---|---|---|---|---|---|")
    for (network, target, method), rows in groups.items():
        rows.sort(key=lambda row: int(row["seed"]))
        errors = [float(row["error"]) for row in rows]
        ratios = sorted({row["compression"] for row in rows}, key=float)
        compression = f"{ratios[0]}–{ratios[-1]}×" if len(ratios) > 1 else f"{ratios[0]}×"
        each = ", ".join(f"{error:.2f}" for error in errors)
        cells = [network, target, NAMES.get(method, method), f"{PASSES[method]:.2f}", compression]
        print(f"| {' | '.join(cells)} | {statistics.mean(errors):.2f}% ({each}) |")


if __name__ == "__main__":
    main()
