"""Fits with workers that are started anew, for ``test_spawned_workers``: ``python spawned_workers_run.py METHOD``.

Such workers get pickles of the dataset and the ``collate_fn``, and with them whatever these refer to.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback


class Data(LightningDataModule):
    """Collates by a method of its own, so that each worker gets the Trainer, and with it the callback."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def collate(self, samples: list[Tensor]) -> Tensor:
        assert self.trainer is not None
        return torch.stack(samples)

    def train_dataloader(self) -> DataLoader[Any]:
        samples: Any = list(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
        options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": self.method}
        return DataLoader(samples, batch_size=8, collate_fn=self.collate, **options)


class Line(LightningModule):
    """A linear layer that learns to give zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    callback = AutoPruneCallback(0.5, held_out=0.25, warmup=0.0, finetune=0.2)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **options)
    trainer.fit(Line(), datamodule=Data(sys.argv[1]))
    print("sparsity", round(callback.sparsity, 2))
