"""One auxiliary parameter m per unit of weights in a layer: the base of blocks, N of M and so on. Torch only."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.exact_topk import largest_count, minimum_counts
from lightning_autoprune.method.granularity.base import Granularity, StepPiece, sensitivity
from lightning_autoprune.method.initialization import InitialM, starting_values
from lightning_autoprune.method.masked_weights import latent_weights
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.sharding import is_sharded

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["LayerUnits"]


class LayerUnits(Granularity):
    """One m per unit of weights within a layer; all units of a layer are treated alike.

    A subclass says how many units a layer has, how the entries of each unit are summed, and how one entry per unit is
    spread to the weights. Weights may be sharded along their first dimension, so a unit must lie within one row.

    Example:
        >>> class RowHalves(LayerUnits):  # one m for each half of a row
        ...     name = "row halves"
        ...     def unit_shape(self, shape):
        ...         return (shape[0], 2)
        ...     def sum_units(self, x):
        ...         return x.reshape(len(x), 2, -1).sum(-1)
        ...     def spread(self, units, shape):
        ...         return units.repeat_interleave(math.prod(shape[1:]) // 2, dim=1).view(shape)
        >>> from lightning_autoprune import AuxiliaryParameters
        >>> layer = torch.tensor([[1.0, -1.0, 3.0, 3.0], [2.0, 2.0, 0.1, 0.1]])
        >>> aux = AuxiliaryParameters({"layer": layer}, granularity=RowHalves())
        >>> aux.meet(0.5)
        >>> layer
        tensor([[0., 0., 3., 3.],
                [2., 2., 0., 0.]])
    """

    def check_sharding(self, weights: Mapping[str, Tensor]) -> None:
        """Raise if a weight is sharded along a dimension other than the first, which could cut units.

        Raises:
            AutoPruneError: naming the layer and the dimension.
        """
        for name, weight in weights.items():
            for placement in weight.placements if is_sharded(weight) else ():
                if placement.is_shard() and not placement.is_shard(0):
                    raise AutoPruneError(
                        f"Layer {name!r} is sharded as {placement}, and the granularity {self.name!r} needs whole rows:"
                        " shard it along dimension 0."
                    )

    @abstractmethod
    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of M for a layer, or for a shard of one, of the given shape."""

    @abstractmethod
    def sum_units(self, x: Tensor) -> Tensor:
        """Sum a tensor in a layer's shape over the entries of each unit, and return one sum per unit."""

    @abstractmethod
    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of a layer's shape in which each weight has the entry of its unit."""

    def mask(self, M: Tensor, shape: Sequence[int]) -> Tensor:
        """Return h(M), a bool tensor in a layer's shape."""
        return self.spread(M > 0, shape)

    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return one flat tensor of zeros per bucket of layers."""
        T = aux.effective()
        return [
            at_least_float32(T[bucket.numbers[0]].new_zeros(sum(self._unit_count(T[i]) for i in bucket.numbers)))
            for bucket in aux.buckets
        ]

    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per layer, in the shape of its units."""
        T, views = aux.effective(), {}
        for bucket, tensor in zip(aux.buckets, flat, strict=True):
            parts = torch.split(tensor, [self._unit_count(T[i]) for i in bucket.numbers])
            views.update({i: x.view(self.unit_shape(T[i].shape)) for i, x in zip(bucket.numbers, parts, strict=True)})
        return [views[i] for i in range(len(views))]

    def initial_M(self, aux: AuxiliaryParameters, name: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        """Return ``scale`` · norm of each unit / root mean square of the layer's norms, or a constant."""

        def start(T: Tensor) -> Tensor:
            norms = self.sum_units(at_least_float32(T).square()).sqrt()
            unit = norms.square().mean().sqrt().clamp_min(1e-30)
            return starting_values(name, norms, unit, scale)

        return self.start_layers(aux, scale, start)

    def sensitivities(
        self, aux: AuxiliaryParameters, dL_dT: Sequence[Tensor | None], rule: UpdateRule
    ) -> Iterator[StepPiece]:
        """Yield one piece per bucket: the sums over each unit, divided by the root of its size unless scale-free."""
        for k in aux.trained_buckets(dL_dT):
            sums, T = [], aux.effective()
            for i in aux.buckets[k].numbers:
                W, gradient = latent_weights(T[i], aux.dormant[i]), dL_dT[i]
                assert gradient is not None
                G = self.sum_units(sensitivity(rule, gradient, W))
                if not rule.removes_scale:
                    G /= self.sum_units(torch.ones_like(W, dtype=G.dtype)).sqrt()
                sums.append(G.flatten())
            yield StepPiece(torch.cat(sums), k, slice(None))

    def update_masks(self, aux: AuxiliaryParameters) -> None:
        """Raise the m that each layer's floor needs, and spread M to the weights."""
        kept = aux.placement.sum([float(torch.count_nonzero(M > 0)) for M in aux.M])
        for M, count, floor in zip(aux.M, kept, aux.floors, strict=True):
            if count < floor:
                aux.placement.lift_largest(M, floor)
        aux.write_layer_masks(self._masks(aux))

    def _masks(self, aux: AuxiliaryParameters) -> list[Tensor]:
        return [self.mask(M, T.shape) for M, T in zip(aux.M, aux.effective(), strict=True)]

    def floors(self, weights: Mapping[str, Tensor], layer_floor: float) -> list[int]:
        """Return the number of units that each layer always keeps."""
        return minimum_counts([self._unit_count(weight) for weight in weights.values()], layer_floor)

    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Keep the units with the largest m, as many as the density allows."""
        before = [M.clone() for M in aux.M]

        def keep(count: int) -> None:
            for M, old in zip(aux.M, before, strict=True):
                M.copy_(old)
            aux.placement.keep_largest(aux.M, aux.floors, count)

        def fits(count: int) -> bool:
            keep(count)
            kept = aux.placement.sum([float(torch.count_nonzero(mask)) for mask in self._masks(aux)])
            return sum(kept) <= density * aux.total * (1 + 1e-9)

        units = sum(self._unit_count(weight) for weight in aux.weights.values())
        keep(largest_count(fits, sum(aux.floors), units))
        self.update_masks(aux)

    def check_density(self, weights: Mapping[str, Tensor], density: float, layer_floor: float) -> None:
        """Raise unless a density can be met with the units that the layers always keep, however large these are."""
        sizes = [self.sum_units(torch.ones(tuple(weight.shape))).flatten() for weight in weights.values()]
        floors = self.floors(weights, layer_floor)
        least = sum(float(size.topk(floor).values.sum()) for size, floor in zip(sizes, floors, strict=True))
        total = sum(weight.numel() for weight in weights.values())
        if least > density * total * (1 + 1e-9):
            raise AutoPruneError(
                f"Keeping {density:.4g} of the weights is not possible with the granularity {self.name!r}: with"
                f" `layer_floor={layer_floor:g}` the {len(sizes)} layers keep {sum(floors)} units, up to"
                f" {least / total:.4g} of the weights. Ask for a lower `target_sparsity`, or lower `layer_floor`."
            )

    def _unit_count(self, layer: Tensor) -> int:
        return math.prod(self.unit_shape(layer.shape))
