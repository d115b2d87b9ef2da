"""Fit on ranks that Lightning starts by itself, and save what the callback of the main process tells.

Argument: the folder to write to.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from helpers import Net, loader, trainer
from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback, layer_sparsity, sparsity


class StopAfter(Callback):
    """A callback that ends training after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop |= trainer.current_epoch == self.epoch


def tell(strategy: str, devices: int = 1, ckpt_path: Any = None, callbacks: Any = (), **options: Any) -> dict[str, Any]:
    """Fit, save ``last.ckpt``, and return what the callback tells and what the model has."""
    callback, model = AutoPruneCallback(**{"target_sparsity": 0.7, "held_out": "train", **options}), Net()
    t = trainer(epochs=6, callbacks=[callback, *callbacks], strategy=strategy, devices=devices)
    t.fit(model, loader(), ckpt_path=ckpt_path)
    t.save_checkpoint("last.ckpt")
    return {
        "sparsity": callback.sparsity,
        "layer_sparsity": callback.layer_sparsity(),
        "layers": callback.layers(),
        "curves": callback.curves,
        "of_model": sparsity(model),
        "layers_of_model": layer_sparsity(model),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    told = {"spawned": tell("ddp_spawn"), "forked": tell("ddp_notebook", devices=2)}
    told["dense"] = tell("ddp_fork", callbacks=[StopAfter(0)], warmup=0.5)
    told["stopped"] = tell("ddp_fork", callbacks=[StopAfter(2)])
    told["resumed"] = tell("ddp_fork", ckpt_path="last.ckpt")
    told["done"] = tell("ddp_fork", ckpt_path="last.ckpt")  # no step is left
    torch.save(told, Path(sys.argv[1]) / "told.pt")
