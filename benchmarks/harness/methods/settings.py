"""The settings of the other methods: the best of their trials (``tuning.py``), which never see the test samples.

AutoPrune has its defaults on all networks.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

from ..results import group_means, read_rows
from ..tasks import TASKS

TRIALS = Path(__file__).parents[2] / "results" / "tuning.csv"
SHARED = {"lenet-5": ("lenet-300-100", 80.0)}  # a trial of LeNet-5 takes minutes, so it uses another task's
OURS = ("autoprune", "autoprune-train", "variant")


def best_settings(task: str, method: str, compression: float | None) -> dict[str, Any]:
    """Return a method's options on a task: those of the best trial at the nearest compression that has trials.

    If there are trials of several lengths, the longest ones count; for LeNet-5, whose runs are older, the shortest
    ones. AutoPrune and the dense network have no options.
    """
    choose_length = min if task in SHARED else max
    task, compression = SHARED.get(task, (task, compression))
    trials = [row for row in _trials() if (row["task"], row["method"]) == (task, method)]
    if not trials or method in OURS or compression is None:
        return {}
    nearest = min((row["target"] for row in trials), key=lambda target: abs(math.log(float(target) / compression)))
    trials = [row for row in trials if row["target"] == nearest]
    epochs = choose_length((row["epochs"] for row in trials), key=int)
    found = group_means([row for row in trials if row["epochs"] == epochs], TASKS[task].metric, ("options",))
    [best] = min(found, key=lambda key: found[key].mean)
    return dict(json.loads(best))


@functools.cache
def _trials() -> list[dict[str, str]]:
    return read_rows(TRIALS)
