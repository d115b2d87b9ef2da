"""A granularity decides which units have an auxiliary parameter m: weights, blocks or channels. Torch only.

It says how the sensitivities of the weights are summed for each m, how M is spread to a mask of the weights, and how a
target is met. Everything else (the update rule, dormant values, saving, sharding) is shared.

To add one, write a subclass and give it a name in ``GRANULARITIES``. If its units lie within a layer, such as a block
of weights or N of M weights, derive it from ``LayerUnits``, which needs three short methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_autoprune.method.initialization import InitialM, can_start, warn_of_constant
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.sharding import WholeTensors

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["Granularity", "StepPiece", "sensitivity"]


class StepPiece(NamedTuple):
    """Some entries of M and what drives them.

    Attributes:
        G: their sensitivities, the loss's part of dL/dm without h'(m); a new flat tensor.
        bucket: the number of the flat tensor of M that they lie in.
        span: their place in that flat tensor.
    """

    G: Tensor
    bucket: int
    span: slice


class Granularity(ABC):
    """Base class of the granularities.

    Methods that take ``aux`` work on the state of an ``AuxiliaryParameters``. Its tensors are shards where the weights
    are sharded.

    Attributes:
        name: as in the setting ``granularity``.
        prunes_single_weights: True if each weight has an m, which starts by what the dense phase measures, and a
            threshold keeps the density on its path. So short runs can rely on both and step M less.
        prunes_channels: True if whole channels are pruned. They are found by tracing the model and can be cut out, so a
            target can count operations.
        can_extend: True if layers that are unfrozen during the run can be pruned too.
        replicated: True if each rank has the whole M.
    """

    name: ClassVar[str]
    prunes_single_weights: ClassVar[bool] = False
    prunes_channels: ClassVar[bool] = False
    can_extend: ClassVar[bool] = True
    replicated: ClassVar[bool] = False

    # M

    @abstractmethod
    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return M as flat tensors of zeros, in at least float32: one per bucket of layers unless ``replicated``."""

    @abstractmethod
    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return views of flat tensors (see :meth:`make_M`), in the shapes that users and checkpoints see."""

    @abstractmethod
    def initial_M(  # noqa: N802
        self, aux: AuxiliaryParameters, name: InitialM, scale: float, fisher: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the M that pruning starts with, in the shapes of :meth:`views`.

        Args:
            aux: the weights.
            name: of the initial m.
            scale: size of the initial m.
            fisher: the mean square of each layer's gradient in the dense phase, where there is one.
        """

    def start_layers(self, aux: AuxiliaryParameters, scale: float, start: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the M of each layer: a constant, with a warning, for a layer whose weights give no M to start with.

        Args:
            aux: the weights.
            scale: size of the initial m, and the constant.
            start: takes the whole weights of a layer and returns its M.
        """
        result, constant = [], []
        for (layer, weight), T in zip(aux.weights.items(), aux.effective(), strict=True):
            m = start(aux.placement.whole(T, weight))
            if not can_start(m):
                m = torch.full_like(m, scale)
                constant.append(layer)
            result.append(aux.placement.shard(m, weight))
        warn_of_constant(constant)
        return result

    def check_sharding(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Raise if weights are sharded in a way that this granularity can't prune.

        Raises:
            AutoPruneError: naming the layer.
        """

    def named_M(self, aux: AuxiliaryParameters) -> Mapping[str, Tensor]:  # noqa: N802
        """Return the whole M by name, for figures, by default per layer; gathered when an entry is read."""
        return WholeTensors(aux.M, aux.weights)

    def whole(self, aux: AuxiliaryParameters, views: Sequence[Tensor]) -> list[Tensor]:
        """Return copies of tensors in the shapes of :meth:`views` as whole tensors, for a checkpoint."""
        if self.replicated:
            return [x.clone() for x in views]
        whole = [aux.placement.gather_for_saving(x, w) for x, w in zip(views, aux.weights.values(), strict=True)]
        return [x.clone() if x is view else x for x, view in zip(whole, views, strict=True)]

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

    def before_forward(self, aux: AuxiliaryParameters) -> None:  # noqa: B027
        """Write the values of pruned weights that M's gradients need in the passes to come; no output may change."""

    def approach(  # noqa: B027
        self, aux: AuxiliaryParameters, density: float, layers: Sequence[int], share: float
    ) -> None:
        """Let the masks of some layers meet a density nearly, if possible: h(M - θ), where M moves by a share of θ."""

    @abstractmethod
    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Move M so that a density is met: exactly with single weights, else as closely as possible from below."""

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
        """Return the fraction that a target refers to, in (0, 1]: kept weights / all weights."""
        return sum(aux.kept) / aux.total

    def density_of(self, aux: AuxiliaryParameters, layers: Sequence[int]) -> float:
        """Return the density of some layers, given their numbers, if a threshold can change it; else that of all."""
        return self.density(aux)

    def sparsity(self, aux: AuxiliaryParameters) -> float:
        """Return the fraction of all prunable weights that are pruned, in [0, 1)."""
        return (aux.total - sum(aux.kept)) / aux.total

    def layer_sparsity(self, aux: AuxiliaryParameters) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return {name: (n - k) / n for name, k, n in zip(aux.weights, aux.kept, aux.totals, strict=True)}

    @classmethod
    def make(cls, neurons: Neurons | None) -> Granularity:
        """Return an instance for a run; ``neurons`` are the model's channels if the granularity prunes channels."""
        return cls()

    # The granularity's own state

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs besides M."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what :meth:`state_dict` gave.

        Raises:
            AutoPruneError: if it was made for another model.
        """


def sensitivity(rule: UpdateRule, dL_dT: Tensor, W: Tensor) -> Tensor:
    """Return a rule's sensitivities in at least float32, as a tensor that may be changed."""
    wide = at_least_float32(dL_dT)
    G = rule.sensitivity(wide, at_least_float32(W)).to(wide.dtype)
    return G.clone() if G.data_ptr() in (dL_dT.data_ptr(), wide.data_ptr()) else G
