"""A pruned network shrunk, beside the dense one that it is measured against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_autoprune import model_cost, shrink

from .tasks import Task


def shrunk(task: Task, network: nn.Module, rows: Tensor) -> tuple[nn.Module, nn.Module, dict[str, float]]:
    """The dense network of a task, as it is trained; the given one shrunk; its FLOPs and parameters / the dense one's.

    Args:
        task: whose network it is.
        network: pruned, with plain weights.
        rows: inputs, of which the first is the example.
    """
    dense = task.network().to(memory_format=torch.channels_last).eval()
    small = shrink(network, rows[:1]).eval()
    whole, left = model_cost(dense, rows[:1]), model_cost(small, rows[:1])
    ratios = {"flops": left.flops / whole.flops, "parameters": left.parameters / whole.parameters}
    return dense, small, {name: round(ratio, 5) for name, ratio in ratios.items()}
