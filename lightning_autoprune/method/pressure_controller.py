"""How hard pruning pushes: the pressure μ, free of the loss's scale. Pure Python.

The loss's part of the auxiliary gradient is divided by s, a running root mean square of it over all prunable weights,
so that η and μ are plain numbers: multiplying the loss by a constant changes neither the masks nor the settings. (How
the paper scales its loss is not stated.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PressureController"]

_LARGEST_ANSWER = 1.0  # of ln μ to one change of the error

_LARGEST = 1e15  # μ


@dataclass
class PressureController:
    """Moves μ so that the density follows a path; without a target μ stays as it is.

    With the error e = ln(density / path),

        ln μ ← ln μ + gain · clip(5e, −1, 1) + clip(response · (e − e before), −1, 1).

    The first term ends a lasting error, even one that swings, the second answers a change at once and so damps
    swings. Working on logarithms it is free of scale. Too many weights left raise μ; too few lower it, and weights
    come back. μ stays above a hundredth of where it started, so that it never has far to climb, and does not exceed
    1e15: where it can't reach the path, as a layer is not trained for a while, it would grow without end, and its
    square must be far from float32's largest number, 3e38. (With the default settings it seldom is above 100.)

    Attributes:
        mu: the pressure, in units of the running root mean square; above 0.
        gain: largest change of ln μ in one update by a lasting error.
        response: change of ln μ by a change of the error.
        error: e at the last update.

    Example:
        >>> controller = PressureController(mu=0.1)
        >>> controller.update(density=0.5, path=0.25) > 0.1
        True
    """

    mu: float
    gain: float = 0.05
    response: float = 10.0
    error: float = 0.0

    def __post_init__(self) -> None:
        self._least = self.mu / 100

    def update(self, density: float, path: float) -> float:
        """Takes the density there is and the one there should be (both > 0), and returns the new μ."""
        error, before = math.log(density / path), self.error
        answer = min(max(self.response * (error - before), -_LARGEST_ANSWER), _LARGEST_ANSWER)
        change = self.gain * min(max(5 * error, -1.0), 1.0) + answer
        self.mu = min(max(self.mu * math.exp(change), self._least), _LARGEST)
        self.error = error
        return self.mu
