"""L0 regularization (Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map

# Temperature and stretch of the hard concrete distribution (section 4 of the paper).
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
SHIFT = BETA * math.log(-GAMMA / ZETA)


def sample(log_alpha: Tensor) -> Tensor:
    """Hard concrete gates in [0, 1], eq. 10 and 11."""
    noise = torch.rand_like(log_alpha).logit_(1e-7)
    stretched = torch.sigmoid((noise + log_alpha) * (1 / BETA)) * (ZETA - GAMMA) + GAMMA
    return nn.functional.hardtanh(stretched, 0.0, 1.0)  # its gradient is faster than that of clamp


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(gate ≠ 0), eq. 12."""
    return torch.sigmoid(log_alpha - SHIFT)


def typical(log_alpha: Tensor) -> Tensor:
    """The gates without noise that the paper tests with, eq. 13."""
    return torch.sigmoid(log_alpha).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


class L0(Regularized):
    """A gate at each weight, drawn once a batch; the penalty is the expected number of open ones / training labels.

    Args:
        compression: prunable weights / those to keep.
        strength: λ of the paper.
        gate_lr: learning rate of the gates' log α at the start; None: the task's.
        open: P(gate ≠ 0) at the start.
        ramp: fraction of the run over which λ rises to its value.
        end: fraction of the run that is over at the cut.
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

    def partner(self, weight: nn.Parameter) -> Tensor:
        """Log α."""
        return torch.full_like(weight, self.log_alpha)

    def forward(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """The layer with gated weights."""
        return linear_map(layer, inputs, layer.weight * sample(partner), layer.bias)

    def regularizer(self) -> Tensor:
        """Expected number of open gates / training labels."""
        return torch.stack([probability_open(partner).sum() for partner in self.partners]).sum() / self.labels

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Grows with the gate."""
        return partner

    def settled(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Gated without noise; a gate that is closed, but kept to meet the target, opens a little."""
        return weight * typical(partner).clamp_min(1e-3)
