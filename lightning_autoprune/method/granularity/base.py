"""What has an auxiliary parameter m: the part of the method in which weights, blocks and channels differ. Torch only.

A granularity says how the sensitivities of the weights are summed up for each m, how M is spread to a mask of the
weights, and how a target is met. Everything else (the update rule, dormant values, saving, sharding) is shared.

To add one whose units lie within a layer, such as a block of weights or N of M, derive from :class:`LayerUnits` and
give the class a name in ``GRANULARITIES``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_autoprune.method.exact_topk import check_count, largest_count, minimum_counts
from lightning_autoprune.method.initialization import InitialM, check_weights, starting_values
from lightning_autoprune.method.masked_weights import latent_weights
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.sharding import WholeTensors

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["Granularity", "LayerUnits", "StepPiece", "sensitivity"]


class StepPiece(NamedTuple):
    """Some entries of M and what drives them.

    Attributes:
        G: their sensitivities, the loss's part of dL/dm without h'(m); a new flat tensor.
        group: the number of the flat tensor of M that they lie in.
        span: where they lie in it.
    """

    G: Tensor
    group: int
    span: slice


class Granularity(ABC):
    """What has an m.

    Methods that take ``aux`` work on the state of an ``AuxiliaryParameters``. Its tensors are shards where the weights
    are sharded.

    Attributes:
        name: as in the setting ``granularity``.
        prunes_channels: True if whole channels are pruned, which are found by tracing the model and can be cut out, so
            that a target can count operations.
        can_extend: True if layers that are unfrozen during the run can be pruned too.
        replicated: True if each rank has the whole M.
    """

    name: ClassVar[str]
    prunes_channels: ClassVar[bool] = False
    can_extend: ClassVar[bool] = True
    replicated: ClassVar[bool] = False

    # M

    @abstractmethod
    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return M as flat tensors of zeros, in at least float32: one per bucket of layers unless ``replicated``."""

    @abstractmethod
    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return flat tensors as of :meth:`make_M` in the shapes in which M is shown and saved."""

    @abstractmethod
    def initial_M(self, aux: AuxiliaryParameters, name: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        """Return the M that pruning starts with, in the shapes of :meth:`views`."""

    def whole_weights(self, aux: AuxiliaryParameters, name: InitialM) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each weight and the whole of its values, after checking that they give an M to start with.

        Raises:
            AutoPruneError: naming the layer, see ``initialization.check_weights``.
        """
        for (layer, weight), T in zip(aux.weights.items(), aux.effective(), strict=True):
            whole = aux.placement.whole(T, weight)
            check_weights(layer, whole, name)
            yield weight, whole

    @abstractmethod
    def named_M(self, aux: AuxiliaryParameters) -> Mapping[str, Tensor]:  # noqa: N802
        """Return the whole M by name, for figures; gathered when an entry is read."""

    def whole(self, aux: AuxiliaryParameters, views: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of tensors in the shapes of :meth:`views` as whole tensors, for a checkpoint."""
        if self.replicated:
            return [x.clone() for x in views]
        return [aux.placement.whole_for_saving(x, w) for x, w in zip(views, aux.weights.values(), strict=True)]

    def shard(self, aux: AuxiliaryParameters, whole: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's shards of what :meth:`whole` gave."""
        if self.replicated:
            return list(whole)
        return [aux.placement.shard(x, w) for x, w in zip(whole, aux.weights.values(), strict=True)]

    # The auxiliary step

    @abstractmethod
    def sensitivities(
        self, aux: AuxiliaryParameters, dL_dT: Sequence[Tensor | None], rule: UpdateRule
    ) -> Iterator[StepPiece]:
        """Yield the sensitivities of all m that have a gradient, in pieces."""

    def add_pressure(self, G: Tensor, mu: float) -> Tensor:
        """Add the pressure to sensitivities, in place, and return them."""
        return G.add_(mu)

    # Masks

    @abstractmethod
    def update_masks(self, aux: AuxiliaryParameters) -> None:
        """Write the masks that M asks for, after raising the m that each layer's floor needs."""

    @abstractmethod
    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Move M so that the density is met as closely as the units allow, from below."""

    @abstractmethod
    def floors(self, weights: Mapping[str, Tensor], layer_floor: float) -> list[int]:
        """Return the number of units that each layer, or group of channels, always keeps."""

    @abstractmethod
    def check_density(self, weights: Mapping[str, Tensor], density: float, layer_floor: float) -> None:
        """Raise unless a density can be met with what the layers always keep.

        Raises:
            AutoPruneError: with the numbers, and what to change.
        """

    def density(self, aux: AuxiliaryParameters) -> float:
        """Return the fraction that a target is for, in (0, 1]: kept weights / all weights."""
        return sum(aux.kept) / aux.total

    def sparsity(self, aux: AuxiliaryParameters) -> float:
        """Return the fraction of all prunable weights that are pruned, in [0, 1)."""
        return (aux.total - sum(aux.kept)) / aux.total

    def layer_sparsity(self, aux: AuxiliaryParameters) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return {name: (n - k) / n for name, k, n in zip(aux.weights, aux.kept, aux.totals, strict=True)}

    def before_final(self, aux: AuxiliaryParameters) -> None:  # noqa: B027
        """Write what else can be zeroed without changing the network's function, before the masks become final."""

    # State of its own

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside M."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what :meth:`state_dict` gave.

        Raises:
            AutoPruneError: if it was made for another model.
        """


class LayerUnits(Granularity):
    """One m per unit of weights within a layer, all units of a layer alike.

    A subclass says how many units a layer has, how the entries of each unit are summed, and how one entry per unit is
    spread to the weights. Weights may be sharded along their first dimension, which a unit must not cross.

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

    @abstractmethod
    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of M for a layer, or for a shard of one, of the given shape."""

    @abstractmethod
    def sum_units(self, x: Tensor) -> Tensor:
        """Return the sums of a tensor in a layer's shape over the entries of each unit."""

    @abstractmethod
    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of a layer's shape in which each weight has the entry of its unit."""

    def mask(self, M: Tensor, shape: Sequence[int]) -> Tensor:
        """Return h(M), a bool tensor in a layer's shape."""
        return self.spread(M > 0, shape)

    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return one flat tensor of zeros per bucket of layers."""
        sizes, T = self._sizes(aux), aux.effective()
        return [
            at_least_float32(T[bucket.numbers[0]].new_zeros(sum(sizes[i] for i in bucket.numbers)))
            for bucket in aux.buckets
        ]

    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per layer, in the shape of its units."""
        sizes, T, views = self._sizes(aux), aux.effective(), {}
        for bucket, tensor in zip(aux.buckets, flat, strict=True):
            parts = torch.split(tensor, [sizes[i] for i in bucket.numbers])
            views.update({i: x.view(self.unit_shape(T[i].shape)) for i, x in zip(bucket.numbers, parts, strict=True)})
        return [views[i] for i in range(len(views))]

    def initial_M(self, aux: AuxiliaryParameters, name: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        """Return ``scale`` · norm of each unit / root mean square of the layer's norms, or a constant."""
        M = []
        for weight, whole in self.whole_weights(aux, name):
            norms = self.sum_units(at_least_float32(whole).square()).sqrt()
            unit = norms.square().mean().sqrt().clamp_min(1e-30)
            M.append(aux.placement.shard(starting_values(name, norms, unit, scale), weight))
        return M

    def named_M(self, aux: AuxiliaryParameters) -> Mapping[str, Tensor]:  # noqa: N802
        """Return M by layer name."""
        return WholeTensors(aux.M, aux.weights)

    def sensitivities(
        self, aux: AuxiliaryParameters, dL_dT: Sequence[Tensor | None], rule: UpdateRule
    ) -> Iterator[StepPiece]:
        """Yield one piece per bucket: the sums over each unit, divided by the root of its size unless scale-free."""
        for k in aux.trained_buckets(dL_dT):
            sums, T = [], aux.effective()
            for i in aux.buckets[k].numbers:
                W, gradient = latent_weights(T[i], aux.bits[i], aux.dormant[i]), dL_dT[i]
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
        self._write(aux)

    def _write(self, aux: AuxiliaryParameters) -> None:
        masks = [
            torch.empty_like(T, dtype=torch.bool).copy_(self.mask(M, T.shape))
            for M, T in zip(aux.M, aux.effective(), strict=True)
        ]
        aux.write_masks(range(len(aux.buckets)), [bucket.flatten(masks) for bucket in aux.buckets])

    def floors(self, weights: Mapping[str, Tensor], layer_floor: float) -> list[int]:
        """Return the number of units that each layer always keeps."""
        return minimum_counts([math.prod(self.unit_shape(w.shape)) for w in weights.values()], layer_floor)

    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Keep the units of largest m, as many as the density allows."""
        before = [M.clone() for M in aux.M]

        def keep(count: int) -> None:
            for M, old in zip(aux.M, before, strict=True):
                M.copy_(old)
            aux.placement.keep_largest(aux.M, aux.floors, count)

        def fits(count: int) -> bool:
            keep(count)
            masks = [self.mask(M, T.shape) for M, T in zip(aux.M, aux.effective(), strict=True)]
            kept = aux.placement.sum([float(torch.count_nonzero(mask)) for mask in masks])
            return sum(kept) <= density * aux.total * (1 + 1e-9)

        units = sum(math.prod(self.unit_shape(weight.shape)) for weight in aux.weights.values())
        keep(largest_count(fits, sum(aux.floors), units))
        self.update_masks(aux)

    def check_density(self, weights: Mapping[str, Tensor], density: float, layer_floor: float) -> None:
        """Raise unless a density can be met with the units that the layers always keep."""
        totals = [math.prod(self.unit_shape(weight.shape)) for weight in weights.values()]
        check_count(round(density * sum(totals)), totals, layer_floor)

    def _sizes(self, aux: AuxiliaryParameters) -> list[int]:
        return [math.prod(self.unit_shape(T.shape)) for T in aux.effective()]


def sensitivity(rule: UpdateRule, dL_dT: Tensor, W: Tensor) -> Tensor:
    """Return a rule's sensitivities in at least float32, as a tensor that may be changed."""
    wide = at_least_float32(dL_dT)
    G = rule.sensitivity(wide, at_least_float32(W))
    return G.clone() if G.data_ptr() in (dL_dT.data_ptr(), wide.data_ptr()) else G
