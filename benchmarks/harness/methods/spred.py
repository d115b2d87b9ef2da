"""Spred (Ziyin and Wang, "spred: Solving L1 Penalty with SGD", 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map


class Spred(Regularized):
    """Each weight is a product u·v: an L2 penalty on u and v has the minima of an L1 penalty on u·v (theorem 1).

    Until the cut, the weight itself holds u and its partner holds v.

    Args:
        compression: prunable weights / weights to keep.
        strength: κ of κ·(Σ u² + Σ v²), which is 2κ·Σ|u·v| where |u| = |v|.
        ramp: fraction of the run over which κ rises to its value.
        end: fraction of the run after which the network is cut.
    """

    def __init__(self, compression: float, strength: float = 3e-4, ramp: float = 0.0, end: float = 0.55) -> None:
        super().__init__(compression, strength, ramp, end)

    def initial_partner(self, weight: nn.Parameter) -> Tensor:
        """Return √|w|, and set the weight to ±√|w|, so that the network starts as the dense one."""
        root = weight.abs().sqrt()
        weight.copy_(root.copysign(weight))
        return root

    def run_layer(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """Run the layer with the product as its weight."""
        return linear_map(layer, inputs, layer.weight * partner, layer.bias)

    def regularizer(self) -> Tensor:
        """Return the sum of squares of both factors."""
        factors = [*(layer.weight for layer in self.layers), *self.partners]
        return torch.stack([factor.square().sum() for factor in factors]).sum()

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the magnitude of the product."""
        return (weight * partner).abs()

    def plain_weight(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the product."""
        return weight * partner
