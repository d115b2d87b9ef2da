"""The method on weights that are sharded over ranks: M, masks and dormant values are cut up as the weights are.

What looks at more than one entry is made the same as on one device: the running root mean square and the numbers of
weights kept are sums over the ranks, from which the largest entries are found too (``selection``).
State is that of whole layers, so that a run can go on with another number of ranks, or without sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.exact_topk import keep_largest
from lightning_autoprune.method.initialization import InitialM, check_values, initial_m
from lightning_autoprune.tensors.bitmasks import pack, unpack
from lightning_autoprune.tensors.sharding import gather_whole, shard_like, sum_over_lower_ranks, sum_over_ranks

__all__ = ["ShardedParameters"]


class ShardedParameters(AuxiliaryParameters):
    """Auxiliary parameters for weights of which each rank has a part; all methods are called on all ranks.

    ``M``, ``dormant``, ``W`` and ``masks()`` are of this rank's parts; numbers (``kept``, ``sparsity``, ``total``) and
    ``state_dict()`` are of whole layers.
    """

    def _check_values(self, initial: InitialM) -> None:
        for name, T, weight in zip(self.weights, self._effective(), self.weights.values(), strict=True):
            check_values(name, gather_whole(T, weight), initial)

    def _initial_M(self, initial: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        parts = zip(self._effective(), self.weights.values(), strict=True)
        return [shard_like(initial_m(gather_whole(T, weight), initial, scale), weight) for T, weight in parts]

    def _over_ranks(self, sums: list[float]) -> list[float]:
        device = next(iter(self.weights.values())).device
        return sum_over_ranks(torch.tensor(sums, dtype=torch.float64, device=device)).tolist()

    def _lift(self, i: int) -> None:
        self._select([i], [0], self.floors[i], prune=False)

    def _keep_best(self, count: int) -> None:
        self._select(range(len(self.M)), self.floors, count)

    def _select(self, which: Sequence[int], floors: Sequence[int], count: int, *, prune: bool = True) -> None:
        M = [self.M[i] for i in which]
        keep_largest(M, floors, count, prune=prune, over_ranks=self._over_ranks, before=sum_over_lower_ranks)

    def _to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        masks = self._wholes(self.masks())
        state["masks"] = [pack(mask) for mask in masks]
        if not self.frozen:
            state["M"], state["squares"] = self._wholes(state["M"]), self._wholes(state["squares"])
            dormant = self._wholes(self.dormant)
            state["dormant"] = [values[~mask] for values, mask in zip(dormant, masks, strict=True)]
        return state

    def _to_load(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        wholes = [unpack(packed, shape) for packed, shape in zip(state["masks"], state["shapes"].values(), strict=True)]
        masks = self._parts(wholes)
        own: dict[str, Any] = {**state, "masks": [pack(mask) for mask in masks]}
        if not state["frozen"]:
            own["M"], own["squares"] = self._parts(state["M"]), self._parts(state["squares"])
            dormant = [
                torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(~mask, values.cpu())
                for mask, values in zip(wholes, state["dormant"], strict=True)
            ]
            parts = zip(self._parts(dormant), masks, strict=True)
            own["dormant"] = [values[~mask.to(values.device)] for values, mask in parts]
        return own

    def _wholes(self, parts: Sequence[Tensor]) -> list[Tensor]:
        # one after the other to the CPU: a device may have no room for all of them
        return [gather_whole(x, weight).cpu() for x, weight in zip(parts, self.weights.values(), strict=False)]

    def _parts(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        return [shard_like(x, weight) for x, weight in zip(wholes, self.weights.values(), strict=False)]
