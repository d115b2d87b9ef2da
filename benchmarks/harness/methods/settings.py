"""Settings of the peers for each network: the best of six to eight trials each, by ``tuning.py``. Ours has its defaults on all.

The methods' own defaults are what was found for LeNet-300-100, and hold for LeNet-5 too.
"""

from __future__ import annotations

from typing import Any

from ..training import Method
from . import METHODS

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": {},
    "transformer": {},
    "tabular": {},
}


def make(task: str, method: str, compression: float | None, seed: int, **options: Any) -> Method:
    """A method by name, with the options given, or if there are none with its settings for the task."""
    return METHODS[method](compression, seed, **(options or SETTINGS.get(task, {}).get(method, {})))
