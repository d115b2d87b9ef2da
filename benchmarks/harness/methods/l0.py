"""L0 regularization (Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and stretch of the hard concrete distribution (section 4 of the paper)."""
SHIFT = BETA * math.log(-GAMMA / ZETA)


def sample_gates(log_alpha: Tensor) -> Tensor:
    """Draw hard concrete gates in [0, 1], eq. 10 and 11."""
    noise = torch.rand_like(log_alpha).logit_(1e-7)
    stretched = torch.sigmoid((noise + log_alpha) * (1 / BETA)) * (ZETA - GAMMA) + GAMMA
    return nn.functional.hardtanh(stretched, 0.0, 1.0)  # its backward pass is faster than that of clamp


def probability_open(log_alpha: Tensor) -> Tensor:
    """Return P(gate ≠ 0), eq. 12."""
    return torch.sigmoid(log_alpha - SHIFT)


def noise_free_gates(log_alpha: Tensor) -> Tensor:
    """Return the gates without noise, with which the paper tests, eq. 13."""
    return torch.sigmoid(log_alpha).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


class L0(Regularized):
    """A random gate per weight, drawn once per batch; the penalty is the expected number of open gates / labels.

    Args:
        compression: prunable weights / weights to keep.
        strength: λ of the paper.
        gate_lr: initial learning rate of the gates' log α; None: the task's.
        open: P(gate ≠ 0) at the start.
        ramp: fraction of the run over which λ rises to its value.
        end: fraction of the run after which the network is cut.
    """

    def __init__(
        self,
        compression: float,
        strength: float = 3.0,
        gate_lr: float | None = 0.01,
        open: float = 0.9,  # noqa: A002
        ramp: float = 0.0,
        end: float = 0.55,
    ) -> None:
        super().__init__(compression, strength, ramp, end, gate_lr)
        self.log_alpha = math.log(open / (1 - open)) + SHIFT

    def initial_partner(self, weight: nn.Parameter) -> Tensor:
        """Return log α."""
        return torch.full_like(weight, self.log_alpha)

    def run_layer(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """Run the layer with gated weights."""
        return linear_map(layer, inputs, layer.weight * sample_gates(partner), layer.bias)

    def regularizer(self) -> Tensor:
        """Return the expected number of open gates / training labels."""
        return torch.stack([probability_open(partner).sum() for partner in self.partners]).sum() / self.labels

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return log α, which grows with the gate."""
        return partner

    def plain_weight(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the weight times its noise-free gate; a closed gate that the target keeps opens a little."""
        return weight * noise_free_gates(partner).clamp_min(1e-3)
