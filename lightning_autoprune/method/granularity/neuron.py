r"""One auxiliary parameter m per channel, that is, per neuron or filter. Torch only.

Let a be the activations of a channel. Every layer that reads the channel computes with a · h(m). This equals
T = W ⊙ h(M) with the same m for all weights that read the channel, and it is done in that way, in place. The derivative
of the loss is

    dL/dm = Σ dL/dT · w · h'(m),   over the weights that read the channel,

and under the paper's rule Σ dL/dT · sgn(w). (For a neuron without normalization, it equals the sum over the weights and
the bias that produce it. If those were masked in its place, a ReLU would be at 0 and pass no gradient, and no neuron
would ever come back.)

The rows that produce pruned channels are masked too. No layer reads these channels, so this changes no output. Only in
the forward and backward passes whose gradients M follows do those rows have their values: without a, there is no dL/dm.
See ``before_forward``.

Channels differ in size. Under a rule that removes the scale (``"adaptive"``), the size does not matter. Under the
others the sum is divided by the root of the number of weights in it.

Source: Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, which reports neuron pruning but does not state its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.exact_topk import keep_largest, largest_count, lift_largest
from lightning_autoprune.method.granularity.base import Granularity, StepPiece, sensitivity
from lightning_autoprune.method.initialization import InitialM, can_start, starting_values, warn_of_constant
from lightning_autoprune.method.masked_weights import latent_weights
from lightning_autoprune.method.neurons import Neurons
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.bitmasks import as_bits, zero_pruned

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["NeuronGranularity"]


class NeuronGranularity(Granularity):
    """Whole channels: M is one tensor with an entry per channel, the same on all ranks.

    The initial m is ``scale`` · norm of the weights that read a channel / root mean square of these norms over the
    channels of the same layers. The floor of a layer is a fraction of its channels.

    Args:
        neurons: the channels, which the weights to prune produce and read.

    Attributes:
        neurons: as given.
        alive: True for each channel that is kept, shape (number of channels,).
    """

    name = "neuron"
    prunes_channels = True
    can_extend = False
    replicated = True

    def __init__(self, neurons: Neurons) -> None:
        self.neurons = neurons
        self.alive = torch.ones(neurons.count, dtype=torch.bool, device=neurons.groups[0].device)
        self._root_sizes: Tensor | None = None  # of the numbers of weights that read each channel
        self._has_activations = True  # whether gradients since the last update of the masks are of prepared passes

    @classmethod
    def make(cls, neurons: Neurons | None) -> NeuronGranularity:
        """Return an instance that prunes the given channels.

        Raises:
            AutoPruneError: if none are given.
        """
        if neurons is None:
            raise AutoPruneError('`granularity="neuron"` prunes channels: pass them as `neurons`.')
        return cls(neurons)

    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return one tensor of zeros, shape (number of channels,)."""
        return [torch.zeros(self.neurons.count, device=self.alive.device)]

    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return the same tensor."""
        return list(flat)

    def initial_M(self, aux: AuxiliaryParameters, name: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        """Return ``scale`` · relative norm of the weights that read each channel, or a constant.

        Channels that are read by zeros alone, or by weights that are not finite, start at the constant too.
        """
        norms = self._sum_over_channels(aux, [T.float().square() for T in aux.effective()]).sqrt()
        constant = torch.zeros(self.neurons.count + 1, dtype=torch.bool, device=norms.device)
        for group in self.neurons.groups:
            norms[group] /= norms[group].square().mean().sqrt().clamp_min(1e-30)
            constant[group] = not can_start(norms[group])
        norms[constant[:-1]] = 1
        if name != "constant":
            layers = dict(zip(aux.weights, aux.effective(), strict=True))
            reading = [layer for layer in layers if constant[self.neurons.columns[layer]].any()]
            unusable = [layer for layer in reading if not (layers[layer].isfinite().all() and layers[layer].any())]
            warn_of_constant(unusable or reading)
        return [starting_values(name, norms, torch.ones_like(norms[0]), scale)]

    def named_M(self, aux: AuxiliaryParameters) -> Mapping[str, Tensor]:  # noqa: N802
        """Return M under the name ``"neurons"``."""
        return {"neurons": aux.M[0]}

    def sensitivities(
        self, aux: AuxiliaryParameters, dL_dT: Sequence[Tensor | None], rule: UpdateRule
    ) -> Iterator[StepPiece]:
        """Yield one piece: the sums over the weights that read each channel.

        Raises:
            AutoPruneError: if the gradients are of a pass in which pruned channels had no activations.
        """
        if not self._has_activations:
            raise AutoPruneError(
                "Pruned channels got no gradient, as the rows that produce them were 0 in the forward pass: call"
                " `before_forward` before it."
            )
        zero = torch.zeros((), device=self.alive.device)
        values = [
            sensitivity(rule, zero.expand(W.shape) if g is None else g, W) for g, W in zip(dL_dT, aux.W, strict=True)
        ]
        G = self._sum_over_channels(aux, values)
        if not rule.removes_scale:
            if self._root_sizes is None:
                ones = [torch.ones_like(T, dtype=torch.float32) for T in aux.effective()]
                self._root_sizes = self._sum_over_channels(aux, ones).sqrt()
            G = G / self._root_sizes
        yield StepPiece(G, 0, slice(None))

    def add_pressure(self, G: Tensor, mu: float) -> Tensor:
        """Add μ times what each channel costs, in place."""
        return G.add_(self.neurons.marginal_costs(self.alive), alpha=mu)

    def update_masks(self, aux: AuxiliaryParameters) -> None:
        """Keep the channels with m > 0 and each layer's floor; write 0 into the weights that read or produce others."""
        m = aux.M[0]
        for group, floor in zip(self.neurons.groups, aux.floors, strict=True):
            part = m[group]
            if int((part > 0).sum()) < floor:
                lift_largest(part, floor)
                m[group] = part
        self.alive = m > 0
        masks = zip(self._kept_rows(aux), self._kept_columns(aux), strict=True)
        aux.write_layer_masks(rows & columns for rows, columns in masks)
        self._has_activations = bool(self.alive.all())

    def before_forward(self, aux: AuxiliaryParameters) -> None:
        """Give the rows that produce pruned channels their values, so that the channels have activations.

        Outputs stay the same, since the weights that read those channels stay 0.
        """
        for T, dormant, columns in zip(aux.effective(), aux.dormant, self._kept_columns(aux), strict=True):
            W = latent_weights(T, dormant)
            zero_pruned(W, columns.to(as_bits(W).dtype).neg_())
            T.copy_(W)
        self._has_activations = True

    def _kept_rows(self, aux: AuxiliaryParameters) -> Iterator[Tensor]:
        """Yield for each weight, in a shape that broadcasts to its own, True in rows that produce kept channels."""
        return self._spread(aux, self.neurons.rows, 0)

    def _kept_columns(self, aux: AuxiliaryParameters) -> Iterator[Tensor]:
        """Yield for each weight, in a shape that broadcasts to its own, True in columns that read kept channels."""
        return self._spread(aux, self.neurons.columns, 1)

    def _spread(self, aux: AuxiliaryParameters, channels: Mapping[str, Tensor], which: int) -> Iterator[Tensor]:
        h = torch.cat([self.alive, self.alive.new_ones(1)])
        for name, weight in aux.weights.items():
            dim = self.neurons.dims[name][which]
            kept = h[aux.placement.shard_along(channels[name], weight, dim)]
            yield kept.view([-1 if d == dim else 1 for d in range(weight.dim())])

    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Keep the channels with the largest m, as many as the density allows."""

        def fits(count: int) -> bool:
            return self.neurons.fits(self._keeping(aux, count) > 0, density)

        count = largest_count(fits, sum(aux.floors), self.neurons.count)
        aux.M[0].copy_(self._keeping(aux, count))
        self.update_masks(aux)

    def _keeping(self, aux: AuxiliaryParameters, count: int) -> Tensor:
        """Return M moved so that exactly ``count`` channels are kept."""
        m, groups = aux.M[0].clone(), self.neurons.groups
        parts = [m[group] for group in groups]
        keep_largest(parts, aux.floors, count)
        for group, part in zip(groups, parts, strict=True):
            m[group] = part
        return m

    def floors(self, weights: Mapping[str, Tensor], layer_floor: float) -> list[int]:
        """Return the number of channels that each group always keeps."""
        return self.neurons.floors(layer_floor)

    def check_density(self, weights: Mapping[str, Tensor], density: float, layer_floor: float) -> None:
        """Raise unless the density can be met with the channels that the layers always keep."""
        self.neurons.check_density(density, layer_floor)

    def density(self, aux: AuxiliaryParameters) -> float:
        """Return the fraction of the cost that is left if pruned channels are cut out, in (0, 1]."""
        return self.neurons.density(self.alive)

    def sparsity(self, aux: AuxiliaryParameters) -> float:
        """Return the fraction of the weights that are cut out with the pruned channels, in [0, 1)."""
        return 1 - self.neurons.remaining(self.alive, self.neurons.sizes)

    def layer_sparsity(self, aux: AuxiliaryParameters) -> dict[str, float]:
        """Return the fraction of each layer's weights that are cut out with the pruned channels, by layer name."""
        return {name: 1 - rows * columns for name, (rows, columns) in self.neurons.shares(self.alive).items()}

    def state_dict(self) -> dict[str, Any]:
        """Return which channels are kept. This is known even once M is gone."""
        return {"alive": self.alive.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            AutoPruneError: if the checkpoint's model has another number of channels.
        """
        if len(state["alive"]) != self.neurons.count:
            raise AutoPruneError(
                f"The checkpoint's run pruned {len(state['alive'])} channels, and this one has {self.neurons.count}:"
                " resume with the same model, `include` and `exclude`."
            )
        self.alive = state["alive"].to(self.alive.device)
        self._has_activations = bool(self.alive.all())

    def _sum_over_channels(self, aux: AuxiliaryParameters, values: Sequence[Tensor]) -> Tensor:
        """Sum one tensor per layer over the weights that read each channel; shape (channels,)."""
        total = torch.zeros(self.neurons.count + 1, device=self.alive.device)
        for (name, weight), value in zip(aux.weights.items(), values, strict=True):
            dim = self.neurons.dims[name][1]
            columns = aux.placement.shard_along(self.neurons.columns[name], weight, dim)
            total.index_add_(0, columns, value.movedim(dim, 0).flatten(1).sum(1).to(total))
        return aux.placement.sum_tensor(total)[:-1]
