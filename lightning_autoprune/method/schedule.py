"""When to prune: the phases of a run, and the path of the density to a target. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Phases", "target_path"]


def target_path(progress: float, start: float, target: float, share: float = 0.9, power: float | None = None) -> float:
    """Density that pruning should have reached: from ``start`` to ``target`` with a power of the time left, then flat.

    Zhu and Gupta ("To prune, or not to prune", 2017) have the power 3 for all targets. Here the density is twice the
    target when 45% of the way is over: a low density is long near its target, where each swap of one weight for another
    matters, and a moderate one is not hurried (benchmarks/ablations.py compares it with fixed powers).

    Args:
        progress: how much of the pruning phase is over, 0 to 1 (values outside are clamped).
        start: density when pruning begins, in (0, 1].
        target: density to reach, in (0, 1].
        share: part of the phase after which the target is reached, in (0, 1].
        power: of the time left, >= 1. None: as said above, at least 1.

    Example:
        >>> target_path(0.0, 1.0, 0.1), round(target_path(0.45 * 0.9, 1.0, 0.1), 4), target_path(0.95, 1.0, 0.1)
        (1.0, 0.2, 0.1)
    """
    if power is None:
        power = max(math.log(max(start / target - 1, 1.0)) / math.log(1 / 0.55), 1.0)
    left = 1 - min(max(progress / share, 0.0), 1.0)
    return float(target + (start - target) * left**power)


@dataclass(frozen=True)
class Phases:
    """The phases of a run, in training steps: dense [0, start), pruning [start, end), frozen [end, total).

    Example:
        >>> Phases.of(100, warmup=0.1, finetune=0.3)
        Phases(start=10, end=70, total=100)
    """

    start: int
    end: int
    total: int

    @classmethod
    def of(cls, total: int, warmup: float, finetune: float) -> Phases:
        """Phases of a run of ``total`` steps, from the fractions of it that are dense and frozen."""
        start = round(warmup * total)
        return cls(start, max(start, total - round(finetune * total)), total)

    def progress(self, step: int) -> float:
        """Share of the pruning phase that is over once ``step`` steps are done, from 0 to 1."""
        return min(max((step - self.start) / max(self.end - self.start, 1), 0.0), 1.0)
