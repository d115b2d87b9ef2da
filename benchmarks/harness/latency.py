"""Latency of several models, measured in turns, so that what else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


@torch.no_grad()
def side_by_side(
    models: Mapping[str, Callable[[Any], Any]], inputs: Any, rounds: int = 25, seconds: float = 0.02
) -> dict[str, float]:
    """The median over the rounds of each model's time / that of the first in the same round.

    Args:
        models: callables by name; the first is what the others are compared with.
        inputs: what they are called with.
        rounds: number of turns.
        seconds: how long each is run in a turn, at least once.
    """
    repeats = {}
    for name, model in models.items():
        model(inputs)
        began = time.perf_counter()
        model(inputs)
        repeats[name] = max(1, round(seconds / (time.perf_counter() - began)))
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        times = {}
        for name, model in models.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                model(inputs)
            times[name] = (time.perf_counter() - began) / repeats[name]
        first = next(iter(times.values()))
        for name, found in times.items():
            ratios[name].append(found / first)
    return {name: statistics.median(found) for name, found in ratios.items()}
