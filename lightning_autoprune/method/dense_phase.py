"""The dense phase: how long it is, and what it measures for the pruning after it. Torch only.

If the user does not say how long to train dense, the training loss decides. A network that is trained already gains
nothing from a long dense phase: the steps are better spent on pruning. It shows in the training loss, which stays near
its first value. Any other network still learns what its weights are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_autoprune.method.fisher import FisherInformation
from lightning_autoprune.method.schedule import Phases

__all__ = ["EARLY", "LATE", "DensePhase", "FirstLosses", "begins_early"]

EARLY = 0.1
"""Fraction of the run after which pruning begins if the network is trained already."""

LATE = 0.25
"""Fraction of the run after which pruning begins otherwise."""

_OBSERVED_STEPS = 100  # the last ones of the dense phase, whose gradients decide where M starts

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


class DensePhase:
    """When pruning begins, and what is measured before it does.

    Args:
        total_steps: length of the run in training steps.
        step: number of steps that are over.
        warmup: fraction of the run that is dense; None: the training loss decides.
        finetune: fraction of the run with final masks.

    Attributes:
        begins_early: whether pruning begins early; None until the training loss decides.
        losses: the training losses that decide.
        fisher: the mean squares of the gradients just before pruning may begin.

    Example:
        >>> import torch
        >>> dense_phase = DensePhase(100, step=0, warmup=None, finetune=0.35)
        >>> for step in range(10):
        ...     dense_phase.add_loss(step, torch.tensor(0.3))
        >>> dense_phase.decides_after(step=9), dense_phase.phases.start
        (True, 25)
        >>> dense_phase.decide(dense_phase.losses.means())
        >>> dense_phase.phases.start
        10
    """

    def __init__(self, total_steps: int, step: int, warmup: float | None, finetune: float) -> None:
        self._late = Phases.of(total_steps, LATE if warmup is None else warmup, finetune)
        self._early = Phases.of(total_steps, EARLY, finetune)
        self._loss_decides = warmup is None and 1 < self._early.start < self._late.start
        self.begins_early: bool | None = None if self._may_decide_after(step) else False
        self.losses, self.fisher = FirstLosses(self._early.start), FisherInformation()

    def _may_decide_after(self, step: int) -> bool:
        return self._loss_decides and step < self._early.start

    @property
    def phases(self) -> Phases:
        """The phases of the run, as far as they are known: pruning may still begin earlier."""
        return self._early if self.begins_early else self._late

    @property
    def late_start(self) -> int:
        """The training step at which pruning begins unless the training loss asks for an early start."""
        return self._late.start

    def add_loss(self, step: int, loss: Tensor) -> None:
        """Take in the training loss of a batch, given the number of steps before its own."""
        if self.begins_early is None:
            self.losses.add(step, loss)

    def decides_after(self, step: int) -> bool:
        """Return True if it is to be decided at the end of a training step whether pruning begins then."""
        return self.begins_early is None and step + 1 == self._early.start

    def decide(self, losses: tuple[float, float] | None) -> None:
        """Begin pruning at the end of the training step under way, or go on as planned.

        Args:
            losses: the training loss of the first step, and the mean of recent ones, over all ranks; None: not known.
        """
        self.begins_early = losses is not None and begins_early(*losses)
        if not self.begins_early:
            self.fisher.clear()  # these gradients are long past when pruning begins

    def observes(self, step: int) -> bool:
        """Return True if the gradients of a training step count, given the number of steps before it."""
        start = self._early.start if self.begins_early is None else self.phases.start
        return 0 < start - step <= _OBSERVED_STEPS

    def state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what resuming needs."""
        losses = self.losses.state_dict() if self.begins_early is None else None
        return {"begins_early": self.begins_early, "first_losses": losses, "fisher": self.fisher.state_dict(weights)}

    def load_state_dict(self, state: Mapping[str, Any], step: int, weights: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave after so many steps, maybe in a run of another length."""
        self.losses, self.fisher = FirstLosses(self._early.start), FisherInformation()
        if "fisher" in state:
            self.fisher.load_state_dict(state["fisher"], weights)
        begins_early = state.get("begins_early", False)
        self.begins_early = bool(begins_early) and self._loss_decides
        if begins_early is None and self._may_decide_after(step):
            self.begins_early = None
            self.losses.load_state_dict(state["first_losses"])
