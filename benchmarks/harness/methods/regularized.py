"""What the peers share that train with a regularizer, are cut to an exact number of weights, and then fine-tune."""

from __future__ import annotations

import functools
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from .common import Masked, top_masks

Layer = nn.Linear | nn.Conv2d


def linear_map(layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer computes, with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight, bias)
    return layer._conv_forward(inputs, weight, bias)


class Regularized(Masked):
    """Adds a penalty and one more parameter a weight until the cut at ``end``; then the network is plain and masked.

    The network keeps its own parameters and names throughout. The further parameters ("partners" of the weights) are
    held here, and only the layers' ``forward`` is replaced until the cut.

    Args:
        compression: prunable weights / those to keep.
        strength: factor of the penalty.
        ramp: fraction of the run over which the penalty rises linearly to its strength.
        end: fraction of the run that is over at the cut.
        partner_lr: learning rate of the partners at the start; None: the task's.
    """

    def __init__(
        self, compression: float, strength: float, ramp: float = 0.0, end: float = 0.66, partner_lr: float | None = None
    ) -> None:
        super().__init__(compression, 0.0, end)
        self.strength, self.ramp, self.partner_lr = strength, ramp, partner_lr
        self.layers: list[Layer] = []
        self.partners: list[nn.Parameter] = []
        self.labels = 0  # what the mean of the loss is over: labels, which are several in a row of text

    def partner(self, weight: nn.Parameter) -> Tensor:
        """Initial value of a weight's partner; the weight may be changed in place."""
        raise NotImplementedError

    def forward(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """What a layer computes before the cut."""
        raise NotImplementedError

    def regularizer(self) -> Tensor:
        """The penalty at strength 1."""
        raise NotImplementedError

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The weights with the largest scores are kept."""
        raise NotImplementedError

    def settled(self, weight: Tensor, partner: Tensor) -> Tensor:
        """The weight of the plain network at the cut; not 0."""
        raise NotImplementedError

    def unwrap(self) -> None:
        """Makes the layers plain again."""
        for layer in self.layers:
            del layer.forward  # that of the class is back

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Gives the layers their partners and ``forward``."""
        self.masks = []
        self.layers = [network.get_submodule(name) for name in prunable_weights(network)]
        with torch.no_grad():
            self.partners = [nn.Parameter(self.partner(layer.weight)) for layer in self.layers]
        for layer, partner in zip(self.layers, self.partners, strict=True):
            layer.forward = functools.partial(self.forward, layer, partner)
        return network

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """Those of the network, and the partners."""
        rate = {} if self.partner_lr is None else {"lr": self.partner_lr}
        return [*super().parameters(network), {"params": self.partners, **rate}]

    def penalty(self, network: nn.Module) -> Tensor | float:
        """The regularizer at its strength of this step; none after the cut."""
        if self.masks:
            return 0.0
        rise = min(self.step / (self.ramp * self.steps), 1.0) if self.ramp else 1.0
        return self.strength * rise * self.regularizer()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the labels."""
        super().on_train_start(trainer, pl_module)
        self.labels = trainer.train_dataloader.dataset.labels.numel()  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Adam begins anew at the cut: the gradients of the plain weights have another scale."""
        before = bool(self.masks)
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.masks and not before:
            for weight in self.weights:
                trainer.optimizers[0].state.pop(weight, None)

    def after_step(self) -> None:
        """Cuts when its time has come."""
        if self.progress == 1 and not self.masks:
            self.cut()

    def cut(self) -> None:
        """Makes the network plain and keeps exactly the target number of weights."""
        pairs = list(zip(self.weights, self.partners, strict=True))
        self.masks = top_masks([self.score(weight, partner) for weight, partner in pairs], self.target)
        settled = [self.settled(weight, partner) for weight, partner in pairs]
        self.unwrap()
        for weight, value in zip(self.weights, settled, strict=True):
            weight.copy_(value)
