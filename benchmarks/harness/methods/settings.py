"""Settings of the peers for each network: the best of six to eight trials each, by ``tuning.py``.

Ours has its defaults on all networks. The peers' own defaults are what was found for LeNet-300-100, and hold for
LeNet-5 too.
"""

from __future__ import annotations

from typing import Any

from ..training import Method
from . import METHODS

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": {
        "gmp": {"begin": 0.15, "end": 0.66, "every": 10},
        "lightning": {"begin": 0.05, "end": 0.3},
        "rigl": {"every": 100, "fraction": 0.5},
        "set": {"every": 30, "fraction": 0.3},
        "hyperflux": {"end": 0.55, "speed": 20.0},
        "l0": {"gate_lr": 0.1, "strength": 10.0},
        "vardrop": {"noise_lr": 0.01, "strength": 10.0},
        "spred": {"strength": 0.01},
        "nncf": {"mask_lr": 0.05, "ramp": 0.3},
    },
    "transformer": {
        "gmp": {"begin": 0.05, "end": 0.45, "every": 10},
        "lightning": {"begin": 0.05, "end": 0.66},
        "rigl": {"every": 30, "fraction": 0.5},
        "set": {"every": 100, "fraction": 0.3},
        "hyperflux": {"end": 0.66, "speed": 40.0},
        "l0": {"gate_lr": 0.1, "strength": 10.0},
        "vardrop": {"noise_lr": 0.01, "strength": 10.0},
        "spred": {"strength": 0.0003},
        "nncf": {"mask_lr": 0.2, "ramp": 0.3},
    },
    "tabular": {
        "gmp": {"begin": 0.15, "end": 0.66, "every": 10},
        "lightning": {"begin": 0.05, "end": 0.66},
        "rigl": {"every": 30, "fraction": 0.5},
        "set": {"every": 30, "fraction": 0.5},
        "hyperflux": {"end": 0.66, "speed": 80.0},
        "l0": {"gate_lr": 0.1, "strength": 0.1},
        "vardrop": {"noise_lr": 0.01, "strength": 0.1},
        "spred": {"strength": 0.001},
        "nncf": {"mask_lr": 0.2, "ramp": 0.5},
    },
}


def make(task: str, method: str, compression: float | None, seed: int, **options: Any) -> Method:
    """A method by name, with the options given, or if there are none with its settings for the task."""
    return METHODS[method](compression, seed, **(options or SETTINGS.get(task, {}).get(method, {})))
