"""How long to train dense if the user does not say: the training loss decides. Torch only.

A network that is trained already gains nothing from a long dense phase: the steps are better spent on pruning. It shows
in the training loss, which stays near its first value. Any other network still learns what its weights are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["EARLY", "LATE", "FirstLosses", "begins_early"]

EARLY = 0.1
"""Fraction of the run after which pruning begins if the network is trained already."""

LATE = 0.25
"""Fraction of the run after which pruning begins otherwise."""

_TRAINED = 0.8  # of the first loss: if the loss is at least so high, the network was trained before


def begins_early(first: float, now: float) -> bool:
    """Return True if pruning should begin early.

    Args:
        first: the training loss of the first step.
        now: the mean training loss of recent steps.

    Returns:
        False also if a loss is not a positive number, whose ratio says nothing.

    Example:
        >>> begins_early(0.30, 0.28), begins_early(2.3, 0.1), begins_early(4.7, 2.6)
        (True, False, False)
    """
    if not (0 < first < math.inf and 0 < now < math.inf):
        return False
    return now / first >= _TRAINED


class FirstLosses:
    """The training losses of the first steps of a run: that of the first step, and the mean over the second half.

    Args:
        steps: number of steps to look at.

    Example:
        >>> import torch
        >>> losses = FirstLosses(steps=4)
        >>> for step, loss in enumerate([8.0, 4.0, 1.0, 3.0]):
        ...     losses.add(step, torch.tensor(loss))
        >>> losses.means()
        (8.0, 2.0)
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._sums: list[Tensor | float] = [0.0, 0.0]  # on the loss's device: fetching each would wait for it
        self._counts = [0, 0]

    def add(self, step: int, loss: Tensor) -> None:
        """Add the loss of a batch; several batches may belong to one step.

        Args:
            step: number of the steps before it.
            loss: a scalar.
        """
        late = step >= self._steps // 2
        if step == 0 or late:
            self._sums[late] = self._sums[late] + loss.detach().float()
            self._counts[late] += 1

    def means(self) -> tuple[float, float] | None:
        """Return the mean loss of the first step, and that of the second half; None if either has none."""
        if not all(self._counts):
            return None
        first, now = (float(total) / count for total, count in zip(self._sums, self._counts, strict=True))
        return first, now

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {"sums": [float(total) for total in self._sums], "counts": list(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._sums, self._counts = list(state["sums"]), list(state["counts"])
