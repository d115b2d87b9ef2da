"""Layers of zeros, and layers that the loss does not use, never stop a run."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, loader, same, saving
from torch import nn

from lightning_autoprune import AutoPruneCallback

CONSTANT = "The weights of 'up' are all 0, or some are not finite"


class AdapterNet(Net):
    """A model with an adapter whose last layer starts as ``value``; it is used from an epoch on, or never."""

    def __init__(self, value: float = 0.0, first_epoch: int = 0) -> None:
        super().__init__()
        self.down, self.up, self.first_epoch = nn.Linear(12, 8), nn.Linear(8, 4), first_epoch
        nn.init.constant_(self.up.weight, value)

    def forward(self, x):
        used = self.current_epoch >= self.first_epoch
        return super().forward(x) + (self.up(torch.relu(self.down(x))) if used else 0)


@pytest.mark.parametrize("held_out", [0.25, "train"])
@pytest.mark.parametrize(
    "model", [{"first_epoch": 5}, {"first_epoch": 99}, {"first_epoch": 99, "value": torch.nan}], ids=str
)
def test_a_spare_layer_starts_at_a_constant_and_the_target_is_met(model, held_out):
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out, warmup=0)  # else they stay dense
    with pytest.warns(UserWarning, match=CONSTANT):
        fit(callback, AdapterNet(**model), epochs=8)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert callback._run.auxiliary_steps.last == callback._run.pruner.phases.end - 1


def test_a_zero_layer_without_a_dense_phase_starts_at_a_constant():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0)
    with pytest.warns(UserWarning, match=CONSTANT):
        model, _ = fit(callback, AdapterNet(), epochs=8)
    assert model.up.weight.any()


@pytest.mark.parametrize("epoch", [3, 6])  # during pruning, and with final masks
def test_a_run_with_a_layer_that_was_never_written_resumes_bit_for_bit(tmp_path, epoch):
    def run(ckpt_path=None):
        callbacks = [AutoPruneCallback(target_sparsity=0.8), saving(str(tmp_path / str(ckpt_path is None)))]
        model = AdapterNet(torch.nan, first_epoch=99)
        fit(callbacks, model, epochs=8, enable_checkpointing=True, ckpt_path=ckpt_path, train=loader())
        return {name: value.nan_to_num(nan=7.0) for name, value in model.state_dict().items()}

    assert same(run(), run(tmp_path / "True" / f"step={8 * epoch}.ckpt"))


def test_a_training_that_has_diverged_still_stops():
    class Diverging(Net):
        def training_step(self, batch):
            return super().training_step(batch) * (torch.nan if self.current_epoch else 1)

    with pytest.raises(ValueError, match="for the 10th time in a row"):
        fit(AutoPruneCallback(target_sparsity=0.8), Diverging(), epochs=8)
