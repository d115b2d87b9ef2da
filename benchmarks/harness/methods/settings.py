"""The settings of the peers: the best of their trials (``tuning.py``), on rows that no result is measured on.

Ours has its defaults on all networks.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from ..results import means, read
from ..tasks import TASKS

TRIALS = Path(__file__).parents[2] / "results" / "tuning.csv"
SHARED = {"lenet-5": ("lenet-300-100", 80.0)}  # a trial takes minutes there
OURS = ("autoprune", "autoprune-train", "variant")


def settings(task: str, method: str, compression: float | None) -> dict[str, Any]:
    """The options of a method on a task: those of the best trial at the compression nearest to the one asked for.

    Where there are trials of several lengths, those of the longest; for LeNet-5, whose runs are older, of the shortest.
    No options for ours and the dense network.
    """
    length = min if task in SHARED else max
    task, compression = SHARED.get(task, (task, compression))
    trials = [row for row in _trials() if (row["task"], row["method"]) == (task, method)]
    if not trials or method in OURS or compression is None:
        return {}
    near = min((row["target"] for row in trials), key=lambda target: abs(math.log(float(target) / compression)))
    trials = [row for row in trials if row["target"] == near]
    epochs = length((row["epochs"] for row in trials), key=int)
    found = means([row for row in trials if row["epochs"] == epochs], TASKS[task].metric, ("options",))
    [best] = min(found, key=lambda key: found[key].mean)
    return dict(json.loads(best))


@functools.cache
def _trials() -> list[dict[str, str]]:
    return read(TRIALS)
