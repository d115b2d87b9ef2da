"""Lightning's own pruning callback, ``ModelPruning``, on the path of gradual magnitude pruning."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from ..training import Method
from .common import cubic, share_over


class LightningPruning(Method):
    """``ModelPruning`` by magnitude, global over the layers, at the ends of epochs.

    The number of kept weights falls on the cubic of Zhu and Gupta (2017), at the epochs' ends only, and is the target
    at the first end of an epoch from ``end`` on. ``ModelPruning`` applies a float ``amount`` to the weights that are
    left, so the callable gives the number of weights to prune next, an int, which rounds nothing.

    Args:
        compression: prunable weights / those to keep.
        begin: fraction of the run that is over when pruning begins.
        end: fraction that is over when the masks are final.
    """

    def __init__(self, compression: float, begin: float = 0.05, end: float = 0.45) -> None:
        self.compression, self.begin, self.end = compression, begin, end
        self.epochs = self.total = self.kept = 0

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Makes the callback for the network's layers."""
        network = network.to(memory_format=torch.contiguous_format)  # global pruning takes views of flat weights
        weights = prunable_weights(network)
        self.total = self.kept = sum(weight.numel() for weight in weights.values())
        self.pruning = ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(network.get_submodule(name), "weight") for name in weights],
            use_global_unstructured=True,
            amount=self.amount,
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=True,
            prune_on_train_epoch_end=True,
        )
        return network

    def callbacks(self) -> list[Callback]:
        """Lightning's callback, and this one, which looks up the length of the run."""
        return [self, self.pruning]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the length of the run."""
        self.epochs = int(trainer.max_epochs or 0)

    def amount(self, epoch: int) -> int:
        """Number of weights to prune at the end of an epoch (from 0), of those that are left."""
        progress = share_over((epoch + 1) / self.epochs, self.begin, self.end)
        target = round(self.total / self.compression)
        before, self.kept = self.kept, round(cubic(progress, self.total, target))
        return before - self.kept

    def finish(self, network: nn.Module) -> nn.Module:
        """The network with plain weights (the callback leaves them so when training ends)."""
        self.pruning.make_pruning_permanent(network)
        return network
