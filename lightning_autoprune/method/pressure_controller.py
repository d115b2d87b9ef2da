"""The controller that moves the pressure μ so that the density follows a path. Pure Python."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["PressureController"]

_LARGEST_CHANGE = 1.0  # of ln μ, in answer to one change of the error
_LARGEST_MU = 1e15


@dataclass
class PressureController:
    """Moves μ so that the density follows a path.

    With the error e = ln(density / path),

        ln μ ← ln μ + gain · clip(5e, −1, 1) + clip(response · (e − previous e), −1, 1).

    The first term ends a lasting error, even one that swings. The second term answers a change at once and so damps
    swings. Logarithms make both independent of scale. Too many kept weights raise μ. Too few lower it, and weights come
    back.

    μ stays at or above a hundredth of its first value, so that it never has far to climb. It does not exceed 1e15. If
    the path can't be reached, because a layer is not trained for a while, μ would otherwise grow without end, and its
    square must stay far below float32's largest number, 3e38. (With the default settings it is seldom above 100.)

    Attributes:
        mu: the pressure, in units of the running root mean square s; above 0.
        gain: largest change of ln μ per update in answer to a lasting error.
        response: change of ln μ per change of the error.
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
        """Return the new μ, given the present density and the wanted one (both > 0)."""
        error, previous = math.log(density / path), self.error
        answer = min(max(self.response * (error - previous), -_LARGEST_CHANGE), _LARGEST_CHANGE)
        change = self.gain * min(max(5 * error, -1.0), 1.0) + answer
        self.mu = min(max(self.mu * math.exp(change), self._least), _LARGEST_MU)
        self.error = error
        return self.mu
