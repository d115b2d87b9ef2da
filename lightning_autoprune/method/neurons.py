r"""Neuron pruning: one auxiliary parameter m for each channel, that is, each neuron or filter. Torch only.

With a the activations of a channel, all that read it compute with a · h(m). That is the same as T = W ⊙ h(M) with one m
for all the weights that read the channel, and it is done so, in place. The derivative of the loss is

    dL/dm = Σ dL/dT · w · h'(m),   over the weights that read the channel,

under the paper's rule Σ dL/dT · sgn(w). (For a neuron without normalization it is the sum over the weights, and the
bias, that make it. Were those masked instead, a ReLU would be at 0 and pass no gradient, and no neuron ever came back.)
When the masks are frozen, the rows that make pruned channels are zeroed too, which changes nothing.

Channels differ in size. Under ``"adaptive"`` each g is divided by its own running root mean square, and size has no
part in it; under the others the sum is divided by the root of the number of weights in it.

Source: Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, which reports neuron pruning and does not state its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.auxiliary import AuxiliaryParameters, Part
from lightning_autoprune.method.exact_topk import keep_largest, lift_largest, minimum_counts
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.update_rules import RunningSquares, sensitivity

__all__ = ["NeuronParameters", "Neurons"]

_SLACK = 1 + 1e-9  # of a target, which is rounded: 1 - 0.9 is below 0.1


@dataclass
class Neurons:
    """The channels of a model that may be pruned, seen from its weights.

    Attributes:
        count: number of channels.
        groups: numbers of the channels that the same layers make together.
        rows: for each weight, by layer name, the channel that each of its rows makes; ``count`` where it makes none.
        columns: the channel that each of its columns reads; ``count`` where it reads none.
        dims: the dimensions of each weight that have rows and columns.
        sizes: number of weights of each layer.
        costs: what each layer costs with all its channels: the same, until it is set to something else.
        rest: what the rest of the model costs.
    """

    count: int
    groups: list[Tensor]
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    dims: dict[str, tuple[int, int]]
    sizes: dict[str, float]
    costs: dict[str, float]
    rest: float = 0.0

    def to(self, device: torch.device) -> Neurons:
        """The same with its tensors on a device."""
        return replace(
            self,
            groups=[group.to(device) for group in self.groups],
            rows={name: numbers.to(device) for name, numbers in self.rows.items()},
            columns={name: numbers.to(device) for name, numbers in self.columns.items()},
        )

    def shares(self, alive: Tensor) -> dict[str, tuple[float, float]]:
        """Fractions of the rows and of the columns of each layer that are left; ``alive`` is bool, one a channel."""
        h = torch.cat([alive, alive.new_ones(1)])
        maps = [numbers for name in self.rows for numbers in (self.rows[name], self.columns[name])]
        left = torch.stack([h[numbers].sum() for numbers in maps]).tolist()  # integers: 0.3 in float32 is above 0.3
        parts = [n / len(numbers) for n, numbers in zip(left, maps, strict=True)]
        return dict(zip(self.rows, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def density(self, alive: Tensor) -> float:
        """What is left of the cost if the channels that are not alive are cut out, as a fraction."""
        return self.left(alive, self.costs, self.rest)

    def left(self, alive: Tensor, costs: Mapping[str, float], rest: float = 0.0) -> float:
        """The same for other costs of the layers and of the rest."""
        kept = sum(costs[name] * rows * columns for name, (rows, columns) in self.shares(alive).items())
        return (kept + rest) / (sum(costs.values()) + rest)

    def floors(self, layer_floor: float) -> list[int]:
        """Number of channels that each group keeps whatever happens."""
        return minimum_counts([len(group) for group in self.groups], layer_floor)

    def check_density(self, density: float, layer_floor: float) -> None:
        """Raises unless the density can be met with what the layers keep whatever happens.

        Raises:
            AutoPruneError: naming the numbers, and what to change.
        """
        least = torch.zeros(self.count, dtype=torch.bool, device=self.groups[0].device)
        for group, floor in zip(self.groups, self.floors(layer_floor), strict=True):
            least[group[:floor]] = True
        if self.density(least) > density * _SLACK:
            raise AutoPruneError(
                f"Keeping {density:.4g} of the model is not possible by pruning neurons: with"
                f" `layer_floor={layer_floor:g}` {int(least.sum())} of {self.count} must stay, which with what is no"
                f" neuron's is {self.density(least):.4g}. Keep more, or lower `layer_floor`."
            )

    def marginal(self, alive: Tensor) -> Tensor:
        """What each channel costs beside those that are alive, / the mean of that; shape (count,)."""
        cost = torch.zeros(self.count + 1, device=alive.device)
        for name, (rows, columns) in self.shares(alive).items():
            for numbers, other in ((self.rows[name], columns), (self.columns[name], rows)):
                cost.index_add_(0, numbers, torch.full(numbers.shape, self.costs[name] * other / len(numbers)).to(cost))
        return cost[:-1] / cost[:-1].mean().clamp_min(1e-30)


class NeuronParameters(AuxiliaryParameters):
    """Auxiliary parameters M with one entry a channel; otherwise as :class:`AuxiliaryParameters`.

    Args:
        weights: parameters by layer name, of all layers that make or read the channels.
        neurons: the channels.
        options: as of :class:`AuxiliaryParameters`; the initial m is ``scale`` times the norm of the weights that read
            a channel / the root mean square of that over the channels of the same layers; ``layer_floor`` is a share of
            those channels.

    Attributes:
        M: one tensor, of shape (number of channels,).
        alive: whether each channel is kept, bool, of the same shape.
    """

    granularity = "neuron"

    def __init__(self, weights: Mapping[str, Tensor], neurons: Neurons, **options: Any) -> None:
        self.neurons = neurons
        self.alive = torch.ones(neurons.count, dtype=torch.bool, device=neurons.groups[0].device)
        super().__init__(weights, **options)
        ones = [torch.ones_like(T, dtype=torch.float32) for T in self._effective()]
        self._root_sizes = self._sum_over_channels(ones).sqrt()  # of the numbers of weights

    @property
    def density(self) -> float:
        """Fraction of the cost that is left if pruned channels are cut out, in (0, 1]; what a target is for."""
        return self.neurons.density(self.alive)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are cut out with the pruned channels, in [0, 1)."""
        return 1 - self.neurons.left(self.alive, self.neurons.sizes)

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are cut out with the pruned channels, in [0, 1), by layer name."""
        return {name: 1 - rows * columns for name, (rows, columns) in self.neurons.shares(self.alive).items()}

    def update_masks(self) -> None:
        """Decides anew which channels are kept, and writes T = W ⊙ h(M) into the weights that read them."""
        m = self.M[0]
        for group, floor in zip(self.neurons.groups, self.neurons.floors(self._layer_floor), strict=True):
            part = m[group]
            if int((part > 0).sum()) < floor:
                lift_largest(part, floor)
                m[group] = part
        self.alive = m > 0
        self._write_channels(rows=False)

    def _write_channels(self, rows: bool) -> None:
        h = torch.cat([self.alive, self.alive.new_ones(1)])
        masks = []
        for name, T in zip(self.weights, self._effective(), strict=True):
            mask = _along(h[self.neurons.columns[name]], T, self.neurons.dims[name][1])
            if rows:
                mask = mask & _along(h[self.neurons.rows[name]], T, self.neurons.dims[name][0])
            masks.append(torch.empty_like(T, dtype=torch.bool).copy_(mask))
        self._decide(range(len(self._buckets)), [bucket.flatten(masks) for bucket in self._buckets])

    def meet(self, density: float) -> None:
        """Prunes or brings back channels in the order of m, until the density is the largest that is not above."""
        low, high = sum(self.neurons.floors(self._layer_floor)), self.neurons.count
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.neurons.density(self._keeping(middle) > 0) <= density * _SLACK
            low, high = (middle, high) if fits else (low, middle - 1)
        self.M[0].copy_(self._keeping(low))
        self.update_masks()

    def _keeping(self, count: int) -> Tensor:
        """M moved so that exactly ``count`` channels are kept."""
        m, groups = self.M[0].clone(), self.neurons.groups
        parts = [m[group] for group in groups]
        keep_largest(parts, self.neurons.floors(self._layer_floor), count)
        for group, part in zip(groups, parts, strict=True):
            m[group] = part
        return m

    def freeze(self) -> None:
        """Makes the masks final and zeroes the rows that make pruned channels."""
        if not self.frozen and self.M:
            self._write_channels(rows=True)
        super().freeze()

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights T."""
        return {**super().state_dict(), "alive": self.alive.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, on weights that hold the T of the same moment."""
        self._check_granularity(state)
        if len(state["alive"]) != self.neurons.count:
            raise AutoPruneError(
                f"The checkpoint's run pruned {len(state['alive'])} channels, and this one has {self.neurons.count}:"
                " resume with the same model, `include` and `exclude`."
            )
        self.alive = state["alive"].to(self.alive.device)
        super().load_state_dict(state)

    # One entry a channel

    def _initial_M(self, initial: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        if initial == "constant":
            return [torch.full((self.neurons.count,), scale, device=self.alive.device)]
        norms = self._sum_over_channels([T.float().square() for T in self._effective()]).sqrt()
        for group in self.neurons.groups:
            norms[group] /= norms[group].square().mean().sqrt().clamp_min(1e-30)
        return [scale * norms]

    def _lay_out_M(self) -> None:  # noqa: N802
        self._flat_M = self.M = [torch.zeros(self.neurons.count, device=self.alive.device)]
        self.squares = [RunningSquares(self.M[0], self.scale.decay)] if self.rule == "adaptive" else []

    @property
    def _v(self) -> list[Tensor]:
        return [squares.v for squares in self.squares]

    def _sensitivities(self, dL_dT: Sequence[Tensor | None]) -> Iterator[Part]:
        zero, M = torch.zeros(()), self.M[0]
        parts = [sensitivity(zero if g is None else g, W, self.rule) for g, W in zip(dL_dT, self.W, strict=True)]
        G = self._sum_over_channels(parts)
        if self.squares:
            yield G, M, self.squares[0].v, self.squares[0]
        else:
            yield G / self._root_sizes, M, M, None

    def _press(self, G: Tensor, mu: float) -> None:
        G.add_(self.neurons.marginal(self.alive), alpha=mu)

    def _sum_over_channels(self, values: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(self.neurons.count + 1, device=self.alive.device)
        for name, value in zip(self.weights, values, strict=True):
            dim = self.neurons.dims[name][1]
            total.index_add_(0, self.neurons.columns[name], value.movedim(dim, 0).flatten(1).sum(1).to(total))
        return total[:-1]


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Values along one dimension of a tensor, to be broadcast along the others."""
    return values.view([-1 if d == dim else 1 for d in range(like.dim())])
