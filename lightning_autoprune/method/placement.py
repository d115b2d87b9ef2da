"""Where weights are: whole on this device, or sharded over the ranks (FSDP2). Torch only.

Auxiliary parameters, masks and dormant values are sharded like the weights. Code that looks at more than one entry goes
through a placement, so that a granularity need not know whether it works on shards. Counts and sums are taken over all
ranks, and saved state is that of whole layers, so that a run can resume on another number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_autoprune.method.exact_topk import keep_largest, lift_largest
from lightning_autoprune.tensors.sharding import (
    gather_whole,
    is_sharded,
    shard_along,
    shard_like,
    sum_numbers_over_ranks,
    sum_over_lower_ranks,
    sum_over_ranks,
)

__all__ = ["Placement", "ShardedPlacement", "placement_of"]


class Placement:
    """Weights that are whole on this device, so nothing has to be sent. Subclasses handle sharded weights."""

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums of some numbers over the ranks that have shards: here the numbers themselves."""
        return numbers

    def sum_tensor(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks that have shards: here the tensor itself."""
        return x

    def whole(self, shard: Tensor, weight: Tensor) -> Tensor:
        """Gather a whole tensor from shards that are laid out like those of a weight."""
        return shard

    def shard(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return this rank's shard of a tensor that all ranks have, sharded like a weight."""
        return x

    def gather_for_saving(self, shard: Tensor, weight: Tensor) -> Tensor:
        """Gather a whole tensor for a checkpoint: here the tensor itself."""
        return shard

    def shard_along(self, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        """Return the entries of a vector along one dimension of a weight that belong to this rank's shard."""
        return x

    def keep_largest(self, M: Sequence[Tensor], floors: Sequence[int], count: int) -> None:
        """Keep the ``count`` largest entries of M, each tensor's floor first; see ``exact_topk.keep_largest``."""
        keep_largest(M, floors, count)

    def lift_largest(self, m: Tensor, count: int) -> None:
        """Raise the ``count`` largest entries of a tensor above 0; see ``exact_topk.lift_largest``."""
        lift_largest(m, count)


class ShardedPlacement(Placement):
    """Weights of which each rank has a shard. All methods are called on all ranks, in the same order.

    Args:
        device: the device of the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums of some numbers over all ranks."""
        return sum_numbers_over_ranks(numbers, self._device)

    def sum_tensor(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks, in place; each rank gets the same bits."""
        return sum_over_ranks(x)

    def whole(self, shard: Tensor, weight: Tensor) -> Tensor:
        """Gather a whole tensor from shards that are laid out like those of a weight."""
        return gather_whole(shard, weight)

    def shard(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return this rank's shard of a tensor that all ranks have, sharded like a weight."""
        return shard_like(x, weight)

    def gather_for_saving(self, shard: Tensor, weight: Tensor) -> Tensor:
        """Gather a whole tensor on the CPU: a device may not have room for all whole tensors at once."""
        return gather_whole(shard, weight).cpu()

    def shard_along(self, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        """Return the entries of a vector along one dimension of a weight that belong to this rank's shard."""
        return shard_along(x, weight, dim)

    def keep_largest(self, M: Sequence[Tensor], floors: Sequence[int], count: int) -> None:
        """Keep the ``count`` largest entries of M over all ranks, each tensor's floor first."""
        keep_largest(M, floors, count, sum_over_ranks=self.sum, sum_over_lower_ranks=sum_over_lower_ranks)

    def lift_largest(self, m: Tensor, count: int) -> None:
        """Raise the ``count`` largest entries of a sharded tensor above 0."""
        keep_largest([m], [0], count, prune=False, sum_over_ranks=self.sum, sum_over_lower_ranks=sum_over_lower_ranks)


def placement_of(weights: Iterable[Tensor]) -> Placement:
    """Return the placement of some weights: sharded if any of them is.

    Example:
        >>> type(placement_of([torch.ones(2)])).__name__
        'Placement'
    """
    sharded = [weight for weight in weights if is_sharded(weight)]
    return ShardedPlacement(sharded[0].device) if sharded else Placement()
