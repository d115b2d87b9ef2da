"""Sparse variational dropout (Molchanov, Ashukha and Vetrov, "Variational Dropout Sparsifies Deep Neural Networks")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map

# Of the approximation of the KL divergence, eq. 14 of the paper (2017).
K1, K2, K3 = 0.63576, 1.87320, 1.48695
TINY = 1e-8


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the noise variance over the squared weight, eq. 11."""
    return log_variance - torch.log(weight.square() + TINY)


def divergence(log_alpha: Tensor) -> Tensor:
    """KL divergence from the posterior of each weight to the log-uniform prior, eq. 14; 0 for infinite noise."""
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * nn.functional.softplus(-log_alpha)


class VariationalDropout(Regularized):
    """Gaussian noise on each weight, of a variance that is learned; the penalty is the KL divergence / training labels.

    The noise is added to the outputs, one draw for each (the local reparametrisation of Kingma et al., 2015, eq. 9 and
    17 of the paper), with the variance as the parameter in place of α (additive noise, section 4.2).

    Args:
        compression: prunable weights / those to keep.
        strength: factor of the divergence; 1 is the variational bound.
        log_variance: of the noise at the start.
        noise_lr: learning rate of the log variances at the start; None: the task's.
        ramp: fraction of the run over which the strength rises to its value (the paper's warm-up).
        end: fraction of the run that is over at the cut.
    """

    def __init__(
        self,
        compression: float,
        strength: float = 0.5,
        log_variance: float = -10.0,
        noise_lr: float | None = None,
        ramp: float = 0.2,
        end: float = 0.55,
    ) -> None:
        super().__init__(compression, strength, ramp, end, noise_lr)
        self.log_variance = log_variance

    def partner(self, weight: nn.Parameter) -> Tensor:
        """Log of the noise variance."""
        return torch.full_like(weight, self.log_variance)

    def forward(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """A draw of the layer's outputs."""
        mean = linear_map(layer, inputs, layer.weight, layer.bias)
        variance = linear_map(layer, inputs.square(), partner.exp(), None)
        # Drawn flat: normal numbers are several times slower to draw in the channels-last format.
        noise = torch.randn(mean.numel()).as_strided(mean.size(), mean.stride())
        return mean + noise * (variance + TINY).sqrt()

    def regularizer(self) -> Tensor:
        """Sum of the divergences / training labels."""
        pairs = zip(self.layers, self.partners, strict=True)
        parts = [divergence(log_alpha(layer.weight, noise)).sum() for layer, noise in pairs]
        return torch.stack(parts).sum() / self.labels

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The paper prunes where α is large."""
        return -log_alpha(weight, partner)

    def settled(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The mean."""
        return weight
