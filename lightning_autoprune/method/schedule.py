"""When to prune: the phases of a run, and the path of the density to a target. Pure Python.

To add a path, write a function here and give it a name in :data:`SCHEDULES` and :data:`ScheduleName`. Users can pass a
function of their own to ``schedule=``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.registry import describe, look_up

__all__ = [
    "SCHEDULES",
    "Phases",
    "Schedule",
    "ScheduleName",
    "check_schedule",
    "make_schedule",
    "steps_advised",
    "target_path",
]

ScheduleName = Literal["polynomial", "cubic", "linear"]

Schedule: TypeAlias = Callable[[float, float, float], float]
"""Takes progress in [0, 1], the first density and the target density; returns a density in (0, 1]."""


def target_path(progress: float, start: float, target: float, share: float = 0.9, power: float | None = None) -> float:
    """Return the density that pruning should have reached: from ``start`` to ``target`` by a power of the time left.

    Zhu and Gupta ("To prune, or not to prune", 2017) use the power 3 for all targets. By default, the power here
    depends on the target: the density is twice the target when 45% of the path is over. With a low target, the density
    then stays near it for a long time, where each swap of one weight for another matters. A moderate target is not
    rushed. (``benchmarks/ablations.py`` compares this with fixed powers.)

    Args:
        progress: how much of the pruning phase is over, 0 to 1 (values outside are clamped).
        start: density when pruning begins, in (0, 1].
        target: density to reach, in (0, 1].
        share: fraction of the phase after which the target is reached, in (0, 1]; the density is constant afterwards.
        power: power of the time left, >= 1. None: chosen from the target, at least 1.

    Example:
        >>> target_path(0.0, 1.0, 0.1), round(target_path(0.45 * 0.9, 1.0, 0.1), 4), target_path(0.95, 1.0, 0.1)
        (1.0, 0.2, 0.1)
    """
    if power is None:
        power = max(math.log(max(start / target - 1, 1.0)) / math.log(1 / 0.55), 1.0)
    left = 1 - min(max(progress / share, 0.0), 1.0)
    return float(target + (start - target) * left**power)


def _cubic(progress: float, start: float, target: float) -> float:
    """The power 3 (Zhu and Gupta, 2017)."""
    return target_path(progress, start, target, power=3)


def _linear(progress: float, start: float, target: float) -> float:
    """The power 1: the density falls by the same amount in every step."""
    return target_path(progress, start, target, power=1)


SCHEDULES: Mapping[str, Schedule] = {"polynomial": target_path, "cubic": _cubic, "linear": _linear}


def make_schedule(schedule: ScheduleName | Schedule) -> Schedule:
    """Return the path that a name or the user's own function stands for.

    Raises:
        AutoPruneError: for an unknown name, or an object that is not callable.
    """
    functions = "a function of progress, first density and target density"
    return look_up("schedule", schedule, SCHEDULES, callable, functions)


def check_schedule(schedule: ScheduleName | Schedule, target: float) -> None:
    """Raise unless a schedule returns densities.

    Args:
        schedule: a name in :data:`SCHEDULES`, or a function.
        target: density to reach, in (0, 1].

    Raises:
        AutoPruneError: naming the progress at which it fails or returns no density.
    """
    path = make_schedule(schedule)
    for percent in range(101):
        try:
            density = path(percent / 100, 1.0, target)
        except Exception as error:
            raise AutoPruneError(
                f"`schedule` {describe(schedule)} could not be called with progress, first density and target density"
                f" ({percent / 100:g}, 1.0, {target:g}): {type(error).__name__}: {error}"
            ) from error
        if not isinstance(density, Real) or not 0 < density <= 1:
            raise AutoPruneError(
                f"`schedule` {describe(schedule)} returned {density!r} at progress {percent / 100:g} for a target"
                f" density of {target:g}; it must return a density, a number in (0, 1]."
            )


def steps_advised(density: float) -> int:
    """Return the length in steps below which a run loses much accuracy by pruning to a density.

    A rule of thumb from ``benchmarks/finetuning.py``, whose networks are trained already: 2 / density², but at most
    40 / density.

    Example:
        >>> [steps_advised(density) for density in (0.5, 0.2, 0.1, 0.05)]
        [8, 50, 200, 800]
    """
    return round(min(2 / density**2, 40 / density))


@dataclass(frozen=True)
class Phases:
    """The phases of a run, in training steps: dense [0, start), pruning [start, end), fine-tuning [end, total).

    Example:
        >>> Phases.of(100, warmup=0.1, finetune=0.3)
        Phases(start=10, end=70, total=100)
    """

    start: int
    end: int
    total: int

    @classmethod
    def of(cls, total: int, warmup: float, finetune: float) -> Phases:
        """Return the phases of a run of ``total`` steps, given the fractions of it that are dense and fine-tuned."""
        start = round(warmup * total)
        return cls(start, max(start, total - round(finetune * total)), total)

    def progress(self, step: int) -> float:
        """Return how much of the pruning phase is over once ``step`` steps are done, from 0 to 1."""
        return min(max((step - self.start) / max(self.end - self.start, 1), 0.0), 1.0)
