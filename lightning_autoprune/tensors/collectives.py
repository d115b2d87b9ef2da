"""What the ranks of a run agree on before M is stepped, so that it stays the same on all. Torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_ranks_agree", "mean_over_ranks"]


def all_ranks_agree(decision: bool, ranks: int, device: torch.device | None = None) -> bool:
    """Whether all ranks decide so; each gets the same answer.

    Args:
        decision: this rank's.
        ranks: how many there are; with one nothing is sent.
        device: of the tensor that is sent.

    Example:
        >>> all_ranks_agree(True, ranks=1)
        True
    """
    if ranks == 1:
        return decision
    votes = torch.tensor(int(decision), device=device)
    dist.all_reduce(votes)
    return int(votes) == ranks


def mean_over_ranks(tensors: Sequence[Tensor], weight: float, ranks: int) -> list[Tensor]:
    """The mean of tensors over the ranks; each rank gets the same bits.

    Args:
        tensors: as many of the same shapes on all ranks.
        weight: of this rank's; 1 in the mean over the ranks.
        ranks: how many there are; with one they are given back as they are.

    Example:
        >>> mean_over_ranks([torch.tensor(0.5)], weight=1.0, ranks=1)
        [tensor(0.5000)]
    """
    if ranks == 1:
        return list(tensors)
    means = torch._foreach_mul(list(tensors), weight / ranks)
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in means]:
        work.wait()
    return list(means)
