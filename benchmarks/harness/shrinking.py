"""Shrinks a pruned network and compares its size with the dense network's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_autoprune import model_cost, shrink

from .tasks import Task


@dataclass(frozen=True)
class ShrinkResult:
    """A shrunk network beside the dense one.

    Attributes:
        dense: the task's network, untrained, in the memory format of training.
        small: the pruned network without its dead channels.
        flops: operations of the small network / those of the dense one.
        parameters: parameters of the small network / those of the dense one.
    """

    dense: nn.Module
    small: nn.Module
    flops: float
    parameters: float


def shrink_and_compare(task: Task, network: nn.Module, samples: Tensor) -> ShrinkResult:
    """Shrink a pruned network with plain weights; the first of the samples is the example input."""
    dense = task.network().to(memory_format=torch.channels_last).eval()
    small = shrink(network, samples[:1]).eval()
    before, after = model_cost(dense, samples[:1]), model_cost(small, samples[:1])
    return ShrinkResult(
        dense, small, round(after.flops / before.flops, 5), round(after.parameters / before.parameters, 5)
    )
