"""Lightning's own pruning callback, ``ModelPruning``: along the path of gradual magnitude pruning, or in equal cuts."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn

from lightning_autoprune.model.prunable_layers import prunable_weights

from ..training import Method
from .common import cubic_path, phase_progress


class LightningPruning(Method):
    """``ModelPruning`` by magnitude, global over the layers, at the ends of epochs.

    At the end of each epoch, the number of kept weights follows the cubic of Zhu and Gupta (2017). It is the target
    from the first epoch that ends at or after ``end``. ``ModelPruning`` takes a float ``amount`` as a fraction of the
    remaining weights. Here ``amount`` therefore returns the number of weights to prune next, an int, which needs no
    rounding.

    Args:
        compression: prunable weights / weights to keep.
        begin: fraction of the run after which pruning begins.
        end: fraction of the run after which the masks are final.
    """

    def __init__(self, compression: float, begin: float = 0.05, end: float = 0.45) -> None:
        self.compression, self.begin, self.end = compression, begin, end
        self.epochs = self.total = self.kept = 0

    def prepare(self, network: nn.Module, inputs: Tensor) -> nn.Module:
        """Create the callback for the network's layers."""
        network = network.to(memory_format=torch.contiguous_format)  # global pruning views weights as flat
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
        """Return this method, which looks up the length of the run, and Lightning's callback."""
        return [self, self.pruning]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the length of the run."""
        self.epochs = int(trainer.max_epochs or 0)

    def amount(self, epoch: int) -> int:
        """Return how many of the remaining weights to prune at the end of an epoch; epochs count from 0."""
        progress = phase_progress((epoch + 1) / self.epochs, self.begin, self.end)
        target = round(self.total / self.compression)
        before, self.kept = self.kept, round(cubic_path(progress, self.total, target))
        return before - self.kept

    def finish(self, network: nn.Module) -> nn.Module:
        """Return the network with plain weights, as the callback leaves it when training ends."""
        self.pruning.make_pruning_permanent(network)
        return network


class LightningPruningInCuts(LightningPruning):
    """``ModelPruning`` by magnitude, global over the layers, in cuts of equally many weights.

    It stands for a run of equal epochs, at whose ends ``ModelPruning`` prunes, but needs no epochs: its method
    ``apply_pruning`` is called at equal distances. The first cut comes one distance after ``begin``, and the last one
    at ``end``.

    Args:
        compression: prunable weights / weights to keep.
        begin: fraction of the run at which the distances begin.
        end: fraction of the run after which the masks are final.
        cuts: their number.
    """

    def __init__(self, compression: float, begin: float = 0.25, end: float = 0.65, cuts: int = 8) -> None:
        super().__init__(compression, begin, end)
        self.cuts = cuts

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the step of each cut."""
        steps, length = int(trainer.estimated_stepping_batches), (self.end - self.begin) / self.cuts
        self.cut_steps = [round(steps * (self.begin + length * i)) for i in range(1, self.cuts + 1)]

    def amount(self, epoch: int) -> int:
        """Return 0: nothing is pruned at the ends of epochs."""
        return 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Prune if a cut is due after this step."""
        done = sum(step <= trainer.global_step for step in self.cut_steps)
        to_prune = self.total - round(self.total / self.compression)
        before, self.kept = self.kept, self.total - round(to_prune * done / self.cuts)
        if before > self.kept:
            self.pruning.apply_pruning(before - self.kept)
