"""Two granularities that the package does not have, each in one class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_autoprune.method.granularity.layer_units import LayerUnits


class Blocks(LayerUnits):
    """One m per block of four consecutive weights of a row; the last block of a row may be smaller."""

    name = "block"

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return shape[0], math.ceil(math.prod(shape[1:]) / 4)

    def sum_units(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), math.prod(x.shape[1:]))
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 4))
        return padded.view(len(x), padded.shape[1] // 4, 4).sum(-1)

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        columns = math.prod(shape[1:])
        return units.repeat_interleave(4, dim=1)[:, :columns].reshape(tuple(shape))


class TwoOfFour(LayerUnits):
    """One m per weight; of every four consecutive weights of a row, at most the two of largest m are kept."""

    name = "2:4"

    def unit_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def sum_units(self, x: Tensor) -> Tensor:
        return x.clone()

    def spread(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        return units

    def mask(self, M: Tensor, shape: Sequence[int]) -> Tensor:
        groups = M.reshape(-1, 4)
        best = groups.topk(2, dim=1).indices
        allowed = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True)
        return (allowed & (groups > 0)).view(tuple(shape))
