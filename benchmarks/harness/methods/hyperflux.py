"""Hyperflux (Barbulescu, Alexoaie and Busoniu, "Hyperflux: Pruning Reveals the Importance of Weights", 2025).

A minimal implementation from the description in the paper, not from its code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from .common import Masked, cubic_path, top_masks


class Hyperflux(Masked):
    """Each weight w has a presence t, and the network computes with T = w · 1[t > 0].

    Flux and pressure train the presences on the training loss: dL/dt = dL/dT · w + γ, where a straight-through
    estimator takes the derivative of the step function to be 1. Weights follow the chain rule: dL/dw is dL/dT where
    t > 0, and 0 elsewhere. Pruned weights therefore keep their values, and return with them when their flux lifts t
    above 0. A scheduler sets the pressure γ; during a regrowth phase γ is 0.

    The paper leaves some choices open, or makes them for longer budgets. Ours are:

    * Training is dense until ``begin``; there is no pretrained network.
    * t starts at 1, and has its own Adam with a fixed learning rate.
    * A multiplicative controller sets γ so that the log density follows a cubic to ``depth`` times the target. Regrowth
      then brings it back to the target.
    * Adam's first moment of pruned weights is set to 0, which keeps their values in place.
    * At ``end``, the weights with the largest t are kept, exactly as many as the target asks for, and fine-tuned.

    Args:
        compression: prunable weights / weights to keep.
        begin: fraction of the run after which pruning begins.
        end: fraction of the run after which the masks are final.
        regrow: fraction of the time between them that has no pressure, at its end.
        depth: density when regrowth begins / density of the target.
        speed: how many times pressure alone could prune a weight while there is pressure; sets t's learning rate.
        gain: of the controller: change of log γ for an error of 1 in log density, in the time that t takes to fall from
            1 to 0.
    """

    def __init__(
        self,
        compression: float,
        begin: float = 0.13,
        end: float = 0.66,
        regrow: float = 0.2,
        depth: float = 0.8,
        speed: float = 40.0,
        gain: float = 2.0,
    ) -> None:
        super().__init__(compression, begin, end)
        self.regrow, self.depth, self.speed, self.gain = regrow, depth, speed, gain

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start dense; the presences are created when pruning begins."""
        super().on_train_start(trainer, pl_module)
        self.presences: list[nn.Parameter] = []
        self.latent: list[Tensor] = []  # w of all weights, while they may return; empty before and after
        self.pressure = 0.0

    def _create_presences(self) -> None:
        self.latent = [weight.detach().clone() for weight in self.weights]
        self.presences = [nn.Parameter(torch.ones_like(weight)) for weight in self.weights]
        steps = self.steps * (self.end - self.begin) * (1 - self.regrow)
        self.optimizer = torch.optim.Adam(self.presences, min(self.speed / steps, 1.0), fused=True)
        self.masks = [presence > 0 for presence in self.presences]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Step the presences, and give the weights their latent values and gradients."""
        if not self.latent:
            return
        layers = list(zip(self.weights, self.latent, self.presences, self.masks, strict=True))
        if not self.pressure:  # the scale of the flux depends on the network: start well below it
            self.pressure = 0.01 * math.sqrt(
                sum(float((w.grad * v).square().sum()) for w, v, *_ in layers) / self.total
            )
        pressure = self.pressure if self.progress < 1 - self.regrow else 0.0
        for weight, latent, presence, mask in layers:
            presence.grad = weight.grad * latent + pressure
            weight.grad.mul_(mask)
            weight.copy_(latent)
            optimizer.state[weight]["exp_avg"].mul_(mask)
        self.optimizer.step()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Store the stepped weights before the masks are applied."""
        for latent, weight in zip(self.latent, self.weights, strict=False):
            latent.copy_(weight)
        super().on_train_batch_end(trainer, pl_module)

    def apply(self) -> None:
        """Set pruned weights to 0, and returning ones to their latent values."""
        for weight, latent in zip(self.weights, self.latent, strict=False):
            weight.data.copy_(latent)
        super().apply()

    def after_step(self) -> None:
        """Update the masks and the pressure; at the end, keep exactly the target number of weights."""
        if self.progress == 0 or (self.masks and not self.latent):
            return
        if not self.latent:
            self._create_presences()
        if self.progress == 1:
            self.masks = top_masks([presence.data for presence in self.presences], self.target)
            self.apply()
            self.latent, self.presences = [], []
            return
        self.masks = [presence > 0 for presence in self.presences]
        descent = min(self.progress / (1 - self.regrow), 1.0)
        wanted = cubic_path(descent, self.total, self.depth * self.target)
        kept = max(sum(int(mask.sum()) for mask in self.masks), 1)
        rate = self.gain * self.optimizer.param_groups[0]["lr"]
        self.pressure *= math.exp(rate * math.log(kept / wanted))
