"""Spred (Ziyin and Wang, "spred: Solving L1 Penalty with SGD", 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map


class Spred(Regularized):
    """Each weight is a product u·v; an L2 penalty on u and v has the minima of an L1 penalty on u·v (theorem 1).

    u is held in the weight itself until the cut, v in its partner.

    Args:
        compression: prunable weights / those to keep.
        strength: κ of κ·(Σ u² + Σ v²), which is 2κ·Σ|u·v| where |u| = |v|.
        ramp: fraction of the run over which κ rises to its value.
        end: fraction of the run that is over at the cut.
    """

    def __init__(self, compression: float, strength: float = 3e-4, ramp: float = 0.0, end: float = 0.55) -> None:
        super().__init__(compression, strength, ramp, end)

    def partner(self, weight: nn.Parameter) -> Tensor:
        """√|w|; the weight becomes ±√|w|, so that the network starts as the dense one."""
        root = weight.abs().sqrt()
        weight.copy_(root.copysign(weight))
        return root

    def forward(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """The layer with the product as its weight."""
        return linear_map(layer, inputs, layer.weight * partner, layer.bias)

    def regularizer(self) -> Tensor:
        """Sum of squares of both factors."""
        factors = [*(layer.weight for layer in self.layers), *self.partners]
        return torch.stack([factor.square().sum() for factor in factors]).sum()

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Magnitude of the product."""
        return (weight * partner).abs()

    def settled(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The product."""
        return weight * partner
