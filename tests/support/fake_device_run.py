"""Fits on a device without float64, and on the CPU, and saves what came out: ``fake_device_run.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from fake_device import strategy  # first: torch looks for the device once
from helpers import Net, held_out_loss, loader, saving
from lightning.pytorch import Trainer, seed_everything
from manual_models import ManualNet

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.tensors.random_state import isolated_random


class ExampleNet(Net):
    """A model whose operations can be counted, and whose channels can be found."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.example_input_array = torch.zeros(2, 12)


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "train": {"held_out": "train"},
    "fixed": {"redraw_held_out": False},
    "loader": {"held_out": loader(seed=1), "train_gradients": True},
    "autoprune": {"update_rule": "autoprune", "estimator": "softplus"},
    "constant": {"initial_m": "constant", "layer_floor": 0.1},
    "neurons": {"granularity": "neuron", "target_flops": 0.5, "target_sparsity": None},
    "manual": {"loss_fn": held_out_loss},
}


def fit(folder: Path, device: str, epochs: int = 4, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    """Fit a model without random layers on one device, and return its weights and what was measured."""
    seed_everything(1, verbose=False)
    callback = AutoPruneCallback(**{"target_sparsity": 0.8, "log_every_n_steps": 1, **options})
    model = ManualNet() if "loss_fn" in options else ExampleNet()
    place: dict[str, Any] = {"strategy": strategy()} if device == "fake" else {"accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[callback, saving(str(folder))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **place,
    )
    trainer.fit(model, loader(), loader(32), ckpt_path=ckpt_path)
    assert trainer.strategy.root_device.type == device
    zeros = sparsity(model)
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    return {"state": state, "sparsity": callback.sparsity, "zeros": zeros}


def draw_beside(*seeds: int) -> dict[str, Any]:
    """Return random numbers of the device, drawn before, inside and after a block that isolates them."""

    def draw() -> list[float]:
        return torch.rand(2, device="fake").tolist()

    torch.manual_seed(0)
    expected = [draw(), draw()]
    torch.manual_seed(0)
    before = draw()
    with isolated_random(*seeds):
        inside = draw()
    return {"expected": expected, "before": before, "inside": inside, "after": draw()}


def train_with_noise(callback: AutoPruneCallback | None) -> dict[str, Any]:
    """Fit a model with dropout and random noise on the device, and return its weights."""
    seed_everything(1, verbose=False)
    model = Net(noisy=True)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    Trainer(max_epochs=2, strategy=strategy(), callbacks=callback, enable_model_summary=False, **options).fit(
        model, loader()
    )
    return {name: value.cpu() for name, value in model.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {
        name: {device: fit(folder / name / device, device, **options) for device in ("cpu", "fake")}
        for name, options in SETTINGS.items()
    }
    checkpoint = folder / "default" / "fake" / "step=16.ckpt"  # while masks are trained
    found["resumed"] = fit(folder / "resumed", "fake", ckpt_path=checkpoint)
    found["random"] = [draw_beside(1), draw_beside(1), draw_beside(2)]
    no_pruning = AutoPruneCallback(pressure=1e-30, auxiliary_lr=1e-30, held_out=loader(seed=1), warmup=0.2)
    found["noisy"] = [train_with_noise(None), train_with_noise(no_pruning)]
    torch.save(found, folder / "found.pt")
