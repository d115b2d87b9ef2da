"""Shared by the other methods: phases, masks by a global score, and exact numbers of weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.model.prunable_layers import prunable_weights

from ..training import Method


def top_masks(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Return bool masks of the ``keep`` largest scores of all tensors together; of equal scores the first ones win."""
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


cubic_path = functools.partial(target_path, share=1.0, power=3)
"""The path of Zhu and Gupta (2017), for a progress from 0 to 1, a first number and a last one."""


def phase_progress(done: float, begin: float, end: float) -> float:
    """Return the progress, 0 to 1, of a phase from ``begin`` to ``end``; all arguments are fractions of the run."""
    return min(max((done - begin) / (end - begin), 0.0), 1.0)


class Masked(Method):
    """A method that keeps masks on plain weights and applies them after each step of the optimizer.

    Args:
        compression: prunable weights / weights to keep.
        begin: fraction of the run after which pruning begins.
        end: fraction of the run after which the masks are final.
    """

    def __init__(self, compression: float, begin: float = 0.13, end: float = 0.66) -> None:
        self.compression, self.begin, self.end = compression, begin, end
        self.weights: list[nn.Parameter] = []
        self.masks: list[Tensor] = []  # empty until pruning begins
        self.step = self.steps = 0

    @property
    def total(self) -> int:
        """Return the number of prunable weights."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def target(self) -> int:
        """Return the number of weights to keep at the end."""
        return round(self.total / self.compression)

    @property
    def progress(self) -> float:
        """Return 0 when pruning begins, 1 when the masks are final, and fractions in between."""
        return phase_progress(self.step / self.steps, self.begin, self.end)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights and the length of the run."""
        self.weights = list(prunable_weights(pl_module).values())
        self.masks, self.step, self.steps = [], 0, int(trainer.estimated_stepping_batches)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Apply the masks, then let the method change them."""
        self.step += 1
        self.apply()
        before = self.masks
        self.after_step()
        if self.masks is not before:
            self.apply()

    def apply(self) -> None:
        """Set pruned weights to 0."""
        for weight, mask in zip(self.weights, self.masks, strict=False):
            weight.data.mul_(mask)

    def after_step(self) -> None:
        """Replace ``masks`` if they change; called after each step of the optimizer."""
