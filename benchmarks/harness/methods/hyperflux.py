"""Hyperflux (Barbulescu, Alexoaie and Busoniu, "Hyperflux: Pruning Reveals the Importance of Weights", 2025).

A minimal implementation, from the paper's description of the method and not its code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from .common import Masked, cubic, top_masks


class Hyperflux(Masked):
    """Each weight w has a presence t; the network computes with T = w · 1[t > 0].

    Flux and pressure train the presences: dL/dt = dL/dT · w + γ, on the training loss, where the step function has the
    identity for a derivative (straight-through). Weights follow the chain rule, dL/dw = dL/dT · 1[t > 0], so that
    pruned ones keep their values and return with them when their flux lifts t above 0. A scheduler sets the pressure γ;
    in a phase of regrowth γ is 0.

    The paper leaves open, or has for longer budgets, what we chose: training is dense until ``begin``, in place of a
    trained network; t starts at 1 and has an Adam of its own with a fixed learning rate; γ is a multiplicative
    controller of log density, which follows a cubic to ``depth`` times the target, so that regrowth comes back to it;
    Adam's first moment of pruned weights is 0, which is what keeps their values. At ``end``, the weights of largest t
    are kept, exactly as many as the target, and fine-tuned.

    Args:
        compression: prunable weights / those to keep.
        begin: fraction of the run that is over when pruning begins.
        end: fraction that is over when the masks are final.
        regrow: share of the time between them with no pressure.
        depth: density when regrowth begins / that of the target.
        speed: how many times pressure alone could prune a weight while there is pressure (sets t's learning rate).
        gain: of the controller: change of log γ for an error of 1 in log density, over the time that t takes to fall
            from 1 to 0.
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
        """Starts dense; the presences are made when pruning begins."""
        super().on_train_start(trainer, pl_module)
        self.presences: list[nn.Parameter] = []
        self.latent: list[Tensor] = []  # w, while weights may return; none before and after
        self.pressure = 0.0

    def _start(self) -> None:
        self.latent = [weight.detach().clone() for weight in self.weights]
        self.presences = [nn.Parameter(torch.ones_like(weight)) for weight in self.weights]
        steps = self.steps * (self.end - self.begin) * (1 - self.regrow)
        self.optimizer = torch.optim.Adam(self.presences, min(self.speed / steps, 1.0), fused=True)
        self.masks = [presence > 0 for presence in self.presences]

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps the presences; gives the weights their latent values and the gradient by the chain rule."""
        if not self.latent:
            return
        parts = list(zip(self.weights, self.latent, self.presences, self.masks, strict=True))
        if not self.pressure:  # the scale of the flux is the network's: begin well below it
            self.pressure = 0.01 * math.sqrt(sum(float((w.grad * v).square().sum()) for w, v, *_ in parts) / self.total)
        pressure = self.pressure if self.progress < 1 - self.regrow else 0.0
        for weight, latent, presence, mask in parts:
            presence.grad = weight.grad * latent + pressure
            weight.grad.mul_(mask)
            weight.copy_(latent)
            optimizer.state[weight]["exp_avg"].mul_(mask)
        self.optimizer.step()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Keeps what the weights have become, before the masks are applied."""
        for latent, weight in zip(self.latent, self.weights, strict=False):
            latent.copy_(weight)
        super().on_train_batch_end(trainer, pl_module)

    def apply(self) -> None:
        """Sets pruned weights to 0; those that return have their latent values."""
        for weight, latent in zip(self.weights, self.latent, strict=False):
            weight.data.copy_(latent)
        super().apply()

    def after_step(self) -> None:
        """Decides which weights are present and controls the pressure; in the end, keeps the target."""
        if self.progress == 0 or (self.masks and not self.latent):
            return
        if not self.latent:
            self._start()
        if self.progress == 1:
            self.masks = top_masks([presence.data for presence in self.presences], self.target)
            self.apply()
            self.latent, self.presences = [], []
            return
        self.masks = [presence > 0 for presence in self.presences]
        over = min(self.progress / (1 - self.regrow), 1.0)
        low = self.depth * self.target
        wanted = cubic(over, self.total, low)
        kept = max(sum(int(mask.sum()) for mask in self.masks), 1)
        rate = self.gain * self.optimizer.param_groups[0]["lr"]
        self.pressure *= math.exp(rate * math.log(kept / wanted))
