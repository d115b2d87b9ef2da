"""Sparse variational dropout (Molchanov, Ashukha and Vetrov, "Variational Dropout Sparsifies Deep Neural Networks")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .regularized import Layer, Regularized, linear_map

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""Constants of the approximate KL divergence, eq. 14 of the paper (2017)."""

TINY = 1e-8


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """Return the log of the noise variance over the squared weight, eq. 11."""
    return log_variance - torch.log(weight.square() + TINY)


def divergence(log_alpha: Tensor) -> Tensor:
    """Return the KL divergence of each weight's posterior from the log-uniform prior, eq. 14; 0 for infinite noise."""
    return K1 * torch.sigmoid(-K2 - K3 * log_alpha) + 0.5 * nn.functional.softplus(-log_alpha)


class VariationalDropout(Regularized):
    """Gaussian noise with a learned variance on each weight; the penalty is the KL divergence / training labels.

    The noise is added to the outputs, one draw per output (the local reparameterization of Kingma et al., 2015, eq. 9
    and 17 of the paper). The parameter is the variance, not α (additive noise, section 4.2).

    Args:
        compression: prunable weights / weights to keep.
        strength: factor of the divergence; 1 is the variational bound.
        log_variance: initial log variance of the noise.
        noise_lr: initial learning rate of the log variances; None: the task's.
        ramp: fraction of the run over which the strength rises to its value (the paper's warm-up).
        end: fraction of the run after which the network is cut.
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

    def initial_partner(self, weight: nn.Parameter) -> Tensor:
        """Return the log of the noise variance."""
        return torch.full_like(weight, self.log_variance)

    def run_layer(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """Draw the layer's outputs."""
        mean = linear_map(layer, inputs, layer.weight, layer.bias)
        variance = linear_map(layer, inputs.square(), partner.exp(), None)
        # Draw a flat tensor: normal numbers are several times slower to draw in the channels-last format.
        noise = torch.randn(mean.numel()).as_strided(mean.size(), mean.stride())
        return mean + noise * (variance + TINY).sqrt()

    def regularizer(self) -> Tensor:
        """Return the sum of the divergences / training labels."""
        pairs = zip(self.layers, self.partners, strict=True)
        divergences = [divergence(log_alpha(layer.weight, noise)).sum() for layer, noise in pairs]
        return torch.stack(divergences).sum() / self.labels

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return -log α, since the paper prunes where α is large."""
        return -log_alpha(weight, partner)

    def plain_weight(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the mean, which the weight itself holds."""
        return weight
