"""Shared by methods that train with a regularizer, are then cut to an exact number of weights, and fine-tune."""

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
    """Run a layer with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight, bias)
    return layer._conv_forward(inputs, weight, bias)


class Regularized(Masked):
    """Adds a penalty, and one more parameter per weight, until the cut; after it the network is plain and masked.

    The network keeps its own parameters and names throughout. This class holds the additional parameters, the
    "partners" of the weights. Until the cut, it also replaces the ``forward`` of the layers, and nothing else of them.

    Args:
        compression: prunable weights / weights to keep.
        strength: factor of the penalty.
        ramp: fraction of the run over which the penalty rises linearly to its strength.
        end: fraction of the run after which the network is cut.
        partner_lr: initial learning rate of the partners; None: the task's.
    """

    def __init__(
        self, compression: float, strength: float, ramp: float = 0.0, end: float = 0.66, partner_lr: float | None = None
    ) -> None:
        super().__init__(compression, 0.0, end)
        self.strength, self.ramp, self.partner_lr = strength, ramp, partner_lr
        self.layers: list[Layer] = []
        self.partners: list[nn.Parameter] = []
        self.labels = 0  # the loss is a mean over labels, of which a sample of text has several

    def initial_partner(self, weight: nn.Parameter) -> Tensor:
        """Return the initial values of a weight's partner; the weight may be changed in place."""
        raise NotImplementedError

    def run_layer(self, layer: Layer, partner: nn.Parameter, inputs: Tensor) -> Tensor:
        """Return the outputs of a layer before the cut."""
        raise NotImplementedError

    def regularizer(self) -> Tensor:
        """Return the penalty at strength 1."""
        raise NotImplementedError

    def score(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return a score per weight; those with the largest scores are kept."""
        raise NotImplementedError

    def plain_weight(self, weight: Tensor, partner: Tensor) -> Tensor:
        """Return the weight of the plain network at the cut, with no entry 0."""
        raise NotImplementedError

    def unwrap(self) -> None:
        """Make the layers plain again."""
        for layer in self.layers:
            del layer.forward  # uncovers the method of the class

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Give the layers their partners and another ``forward``."""
        self.masks = []
        self.layers = [network.get_submodule(name) for name in prunable_weights(network)]
        with torch.no_grad():
            self.partners = [nn.Parameter(self.initial_partner(layer.weight)) for layer in self.layers]
        for layer, partner in zip(self.layers, self.partners, strict=True):
            layer.forward = functools.partial(self.run_layer, layer, partner)
        return network

    def parameters(self, network: nn.Module) -> list[dict[str, Any]]:
        """Return the parameters of the network, and the partners as a second group."""
        rate = {} if self.partner_lr is None else {"lr": self.partner_lr}
        return [*super().parameters(network), {"params": self.partners, **rate}]

    def penalty(self, network: nn.Module) -> Tensor | float:
        """Return the regularizer times its strength in this step; 0 after the cut."""
        if self.masks:
            return 0.0
        rise = min(self.step / (self.ramp * self.steps), 1.0) if self.ramp else 1.0
        return self.strength * rise * self.regularizer()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the labels."""
        super().on_train_start(trainer, pl_module)
        self.labels = trainer.train_dataloader.dataset.labels.numel()  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Reset Adam at the cut, since the gradients of the plain weights have another scale."""
        was_cut = bool(self.masks)
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.masks and not was_cut:
            for weight in self.weights:
                trainer.optimizers[0].state.pop(weight, None)

    def after_step(self) -> None:
        """Cut the network when ``end`` is reached."""
        if self.progress == 1 and not self.masks:
            self.cut()

    def cut(self) -> None:
        """Make the network plain, and keep exactly the target number of weights."""
        pairs = list(zip(self.weights, self.partners, strict=True))
        self.masks = top_masks([self.score(weight, partner) for weight, partner in pairs], self.target)
        values = [self.plain_weight(weight, partner) for weight, partner in pairs]
        self.unwrap()
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)
