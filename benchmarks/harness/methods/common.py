"""What the peers share: their phases, global masks by a score, and cutting to an exact number of weights."""

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
    """Bool masks of the ``keep`` largest of all scores together (ties: the first ones)."""
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


# From the first number to the second, as Zhu and Gupta (2017) prune, for a progress from 0 to 1.
cubic = functools.partial(target_path, share=1.0, power=3)


def share_over(done: float, begin: float, end: float) -> float:
    """How much of the part of a run from ``begin`` to ``end`` is over, 0 to 1; all three are fractions of the run."""
    return min(max((done - begin) / (end - begin), 0.0), 1.0)


class Masked(Method):
    """A method that keeps masks on plain weights and applies them after each step of the optimizer.

    Args:
        compression: prunable weights / those to keep.
        begin: fraction of the run that is over when pruning begins.
        end: fraction that is over when the masks are final.
    """

    def __init__(self, compression: float, begin: float = 0.13, end: float = 0.66) -> None:
        self.compression, self.begin, self.end = compression, begin, end
        self.weights: list[nn.Parameter] = []
        self.masks: list[Tensor] = []  # none before the first is made
        self.step = self.steps = 0

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def target(self) -> int:
        """Number of weights to keep at the end."""
        return round(self.total / self.compression)

    @property
    def progress(self) -> float:
        """From 0 when pruning begins to 1 when the masks are final."""
        return share_over(self.step / self.steps, self.begin, self.end)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the weights and the length of the run."""
        self.weights = list(prunable_weights(pl_module).values())
        self.masks, self.step, self.steps = [], 0, int(trainer.estimated_stepping_batches)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Applies the masks, then lets the method change them."""
        self.step += 1
        self.apply()
        before = self.masks
        self.after_step()
        if self.masks is not before:
            self.apply()

    def apply(self) -> None:
        """Sets pruned weights to 0."""
        for weight, mask in zip(self.weights, self.masks, strict=False):
            weight.data.mul_(mask)

    def after_step(self) -> None:
        """Called after each step of the optimizer: may replace ``masks``."""
