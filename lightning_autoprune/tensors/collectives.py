"""Votes and means over the ranks of a run, with the same bits on every rank. Torch only.

M is stepped on each rank, from the same numbers, so that it stays the same on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_ranks_agree", "mean_over_ranks"]


def all_ranks_agree(decision: bool, ranks: int, device: torch.device | None = None) -> bool:
    """Return True on every rank if `decision` is True on all of them, else False on every rank.

    Args:
        decision: the vote of this rank.
        ranks: number of ranks; nothing is sent if it is 1.
        device: device of the tensor that is sent.

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
    """Return the weighted mean of each tensor over the ranks, in place; every rank gets the same bits.

    Args:
        tensors: the tensors of this rank; all ranks pass as many, of the same shapes.
        weight: the weight of this rank; the weights of all ranks have a mean of 1.
        ranks: number of ranks; if it is 1, the tensors are returned unchanged.

    Example:
        >>> mean_over_ranks([torch.tensor(0.5)], weight=1.0, ranks=1)
        [tensor(0.5000)]
    """
    if ranks == 1:
        return list(tensors)
    torch._foreach_mul_(list(tensors), weight / ranks)
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()
    return list(tensors)
