"""Latency of several models that take turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


@torch.no_grad()
def relative_latencies(
    models: Mapping[str, Callable[[Any], Any]], inputs: Any, rounds: int = 25, seconds: float = 0.02
) -> dict[str, float]:
    """Return each model's time as a ratio to the first model's in the same round, median over the rounds.

    Args:
        models: callables by name; the others are compared with the first.
        inputs: the argument of each call.
        rounds: number of turns per model.
        seconds: how long each model is run in a turn; at least one call is made.
    """
    calls_per_turn = {}
    for name, model in models.items():
        model(inputs)  # the first call is slower
        start = time.perf_counter()
        model(inputs)
        calls_per_turn[name] = max(1, round(seconds / (time.perf_counter() - start)))
    ratios: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        times = {}
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(calls_per_turn[name]):
                model(inputs)
            times[name] = (time.perf_counter() - start) / calls_per_turn[name]
        first = next(iter(times.values()))
        for name, seconds_per_call in times.items():
            ratios[name].append(seconds_per_call / first)
    return {name: statistics.median(values) for name, values in ratios.items()}
