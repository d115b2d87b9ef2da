"""After any run, the callback reports the sparsity that the model has; ``docs/logging.md`` has the exceptions."""

from __future__ import annotations

import pytest
import torch
from helpers import FEATURES, Net, fit, held_out_loss, loader, saving
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from manual_models import ManualNet
from torch import nn

from lightning_autoprune import AutoPruneCallback, layer_sparsity, sparsity


class BackboneNet(Net):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU())

    def forward(self, x):
        return super().forward(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


class TiedNet(Net):
    def __init__(self):
        super().__init__(hidden=FEATURES)
        self.more = nn.Linear(FEATURES, FEATURES)
        self.more.weight = self.first.weight

    def forward(self, x):
        return super().forward(self.more(x))


class RecurrentNet(Net):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(FEATURES, FEATURES, batch_first=True)

    def forward(self, x):
        return super().forward(self.recurrent(x.unsqueeze(1))[0].squeeze(1))


class ResettingNet(Net):
    """A model that goes back to its first weights in the last epoch."""

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            self.kept = {name: value.clone() for name, value in self.state_dict().items()}
        if self.current_epoch == 4:
            self.load_state_dict(self.kept)


RUNS = {
    "defaults": ({}, {}),
    "no target": ({"pressure": 1.0}, {}),
    "train": ({"held_out": "train"}, {}),
    "val": ({"held_out": "val"}, {"val": loader(64)}),
    "loader": ({"held_out": loader(64, seed=3)}, {}),
    "fixed part": ({"redraw_held_out": False}, {}),
    "constant": ({"initial_m": "constant"}, {}),
    "autoprune": ({"update_rule": "autoprune", "estimator": "softplus"}, {}),
    "every third step": ({"mask_every_n_steps": 3}, {}),
    "never final": ({"finetune": 0.0}, {}),
    "dense": ({"warmup": 1.0}, {}),
    "off": ({"enabled": False}, {}),
    "floor": ({"layer_floor": 0.2, "target_sparsity": 0.7}, {}),
    "sgd": ({}, {"model_options": {"optimizer": "sgd", "noisy": True}}),
    "accumulating": ({}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
    "64-true": ({}, {"precision": "64-true"}),
    "stopped in the dense phase": ({}, {"max_steps": 4}),
    "time is over": ({}, {"max_time": "00:00:00:00"}),
    "sanity check": ({}, {"val": loader(64), "num_sanity_val_steps": 2}),
    "fast_dev_run": ({}, {"fast_dev_run": 3}),
    "ema": ({}, {"callbacks": [EMAWeightAveraging(decay=0.5)]}),
    "swa": ({}, {"callbacks": [StochasticWeightAveraging(0.01, swa_epoch_start=0.9, annealing_epochs=1)]}),
    "manual": ({"loss_fn": held_out_loss}, {"model": ManualNet}),
    "tied": ({}, {"model": TiedNet}),
    "recurrent": ({}, {"model": RecurrentNet}),
    "unfrozen": ({"warmup": 0.1}, {"model": BackboneNet, "callbacks": [BackboneFinetuning(2)]}),
    "reset": ({}, {"model": ResettingNet}),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_the_callback_reports_the_sparsity_of_the_model(name):
    settings, given = RUNS[name]
    options = {"epochs": 5, **given}
    callback = AutoPruneCallback(**{"target_sparsity": None if name == "no target" else 0.8, **settings})
    if isinstance(kind := options.get("model"), type):
        options["model"] = kind()
    model, _ = fit([callback, *options.pop("callbacks", [])], **options)
    assert callback.sparsity == sparsity(model)
    if callback.sparsity:
        assert callback.layer_sparsity() == layer_sparsity(model)
        assert {row.name: row.sparsity for row in callback.layers()} == layer_sparsity(model)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_reports_the_sparsity_of_the_model():
    fit([AutoPruneCallback(0.8), saving(every_n_train_steps=8)], epochs=5, enable_checkpointing=True)
    for step in (8, 16, 32, 40):
        callback = AutoPruneCallback(0.8)
        model, _ = fit(callback, epochs=5, ckpt_path=f"checkpoints/step={step}.ckpt")
        assert callback.sparsity == sparsity(model) > 0.7


@pytest.mark.filterwarnings("ignore")
def test_layers_that_are_not_pruned_are_not_counted():
    callback = AutoPruneCallback(0.8, exclude=["last"])
    model, _ = fit(callback, epochs=5)
    assert callback.sparsity == sparsity(model.first.weight) > sparsity(model)
