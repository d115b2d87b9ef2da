"""The channels of a model, that is, its neurons and filters, as seen from its weights. Torch only."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.exact_topk import minimum_counts

__all__ = ["Neurons"]

_SLACK = 1 + 1e-9  # a target is rounded: 1 - 0.9 is below 0.1


@dataclass
class Neurons:
    """The channels of a model that may be pruned.

    A dense layer's weight has a row per channel that it produces and a column per channel that it reads.

    Attributes:
        count: number of channels.
        groups: the channels that the same layers produce together, as index tensors.
        rows: for each weight, by layer name, the channel that each row produces; ``count`` if it is not prunable.
        columns: the channel that each column reads; ``count`` if it is not prunable.
        dims: the dimensions of each weight in which its rows and its columns lie.
        sizes: number of weights of each layer.
        costs: what each layer costs with all its channels: its size, or its operations.
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
        """Return a copy with its tensors on a device."""
        return replace(
            self,
            groups=[group.to(device) for group in self.groups],
            rows={name: numbers.to(device) for name, numbers in self.rows.items()},
            columns={name: numbers.to(device) for name, numbers in self.columns.items()},
        )

    def select(self, names: Container[str]) -> Neurons:
        """Return a copy that has only some of the layers; the channels stay the same."""
        maps = (self.rows, self.columns, self.dims, self.sizes, self.costs)
        rows, columns, dims, sizes, costs = ({n: x for n, x in m.items() if n in names} for m in maps)
        return replace(self, rows=rows, columns=columns, dims=dims, sizes=sizes, costs=costs)  # type: ignore[arg-type]

    def shares(self, alive: Tensor) -> dict[str, tuple[float, float]]:
        """Return the fractions of each layer's rows and columns that remain; ``alive`` is bool, one per channel."""
        h = torch.cat([alive, alive.new_ones(1)])
        maps = [numbers for name in self.rows for numbers in (self.rows[name], self.columns[name])]
        left = torch.stack([h[numbers].sum() for numbers in maps]).tolist()  # integers: 0.3 in float32 is above 0.3
        fractions = [n / len(numbers) for n, numbers in zip(left, maps, strict=True)]
        return dict(zip(self.rows, zip(fractions[::2], fractions[1::2], strict=True), strict=True))

    def density(self, alive: Tensor) -> float:
        """Return the fraction of the model's cost that remains if only the ``alive`` channels are kept."""
        return self.remaining(alive, self.costs, self.rest)

    def remaining(self, alive: Tensor, costs: Mapping[str, float], rest: float = 0.0) -> float:
        """Return the fraction of ``costs`` (plus ``rest``) that remains if only the ``alive`` channels are kept."""
        kept = sum(costs[name] * rows * columns for name, (rows, columns) in self.shares(alive).items())
        return (kept + rest) / (sum(costs.values()) + rest)

    def fits(self, alive: Tensor, density: float) -> bool:
        """Return True if the cost of the ``alive`` channels is not above a density, up to rounding."""
        return self.density(alive) <= density * _SLACK

    def floors(self, layer_floor: float) -> list[int]:
        """Return the number of channels that each group always keeps."""
        return minimum_counts([len(group) for group in self.groups], layer_floor)

    def check_density(self, density: float, layer_floor: float) -> None:
        """Raise unless a density can be met with the channels that the layers always keep.

        Raises:
            AutoPruneError: with the numbers, and what to change.
        """
        least = torch.zeros(self.count, dtype=torch.bool, device=self.groups[0].device)
        for group, floor in zip(self.groups, self.floors(layer_floor), strict=True):
            least[group[:floor]] = True
        if not self.fits(least, density):
            raise AutoPruneError(
                f"Keeping {density:.4g} of the model is not possible by pruning neurons: with"
                f" `layer_floor={layer_floor:g}`, {int(least.sum())} of {self.count} neurons must stay. With the"
                f" weights that belong to no neuron, they make up {self.density(least):.4g} of it. Keep more, or lower"
                " `layer_floor`."
            )

    def marginal_costs(self, alive: Tensor) -> Tensor:
        """Return each channel's cost given the ``alive`` ones, divided by the mean cost; shape (count,)."""
        cost = torch.zeros(self.count + 1, device=alive.device)
        for name, (rows, columns) in self.shares(alive).items():
            for numbers, other in ((self.rows[name], columns), (self.columns[name], rows)):
                cost.index_add_(0, numbers, torch.full(numbers.shape, self.costs[name] * other / len(numbers)).to(cost))
        return cost[:-1] / cost[:-1].mean().clamp_min(1e-30)
