"""Models that train by manual optimization."""

from __future__ import annotations

from typing import Any

import torch
from helpers import Net
from torch import nn


class ManualNet(Net):
    """A model that takes its own optimizer steps in ``training_step``."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        opt.step()


class TwoOptimizersNet(ManualNet):
    """A model with two optimizers, which step after a backward pass each; the second one trains biases only."""

    def training_step(self, batch: Any) -> None:
        for opt in self.optimizers():
            opt.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            opt.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        weights = [p for p in self.parameters() if p.dim() > 1]
        biases = [p for p in self.parameters() if p.dim() == 1]
        return [torch.optim.SGD(weights, 0.05), torch.optim.SGD(biases, 0.05)]
