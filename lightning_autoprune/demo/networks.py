"""LeNet-300-100 and LeNet-5 as plain modules, and the LightningModule that trains them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_autoprune.training.lightning_package import LightningModule, OptimizerLRSchedulerConfig

__all__ = ["Classifier", "DigitsClassifier", "lenet5", "lenet_300_100"]


def lenet_300_100(pixels: int = 784) -> nn.Sequential:
    """Return LeNet-300-100: three linear layers, which have 266,200 weights for 784 pixels."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(pixels, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet5() -> nn.Sequential:
    """Return LeNet-5 as the pruning literature uses it (20-50-500-10, 430,500 weights), for images of 28×28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


class Classifier(LightningModule):
    """A classifier of ten classes, trained by Adam with a cosine schedule over the run.

    Args:
        network: maps images of shape (batch, 1, height, width) to logits of shape (batch, 10).
        lr: initial learning rate.
    """

    def __init__(self, network: nn.Module, lr: float = 1e-3) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape (batch, 10)."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the error in percent as ``val_error``."""
        self._log_error(batch, "val_error")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Log the error in percent as ``test_error``."""
        self._log_error(batch, "test_error")

    def _log_error(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        error = (self(batch[0]).argmax(1) != batch[1]).float().mean()
        self.log(name, 100 * error, batch_size=len(batch[1]), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return Adam, and a cosine schedule over the steps of the run."""
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return OptimizerLRSchedulerConfig(optimizer=optimizer, lr_scheduler={"scheduler": schedule, "interval": "step"})


class DigitsClassifier(Classifier):
    """LeNet-300-100 for images of 8×8 pixels, for a configuration file.

    Args:
        lr: initial learning rate.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lenet_300_100(pixels=64), lr)
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(1, 1, 8, 8)
