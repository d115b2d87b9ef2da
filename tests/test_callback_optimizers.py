"""Pruned weights stay zero whatever steps them."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, loader
from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback, sparsity


class Hookless(torch.optim.SGD):
    """Calls no hooks, as a wrapper of another optimiser may; moves all weights."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for weight in self.param_groups[0]["params"]:
            weight.sub_(0.05 * weight.grad + 0.001)
        return loss

    step.hooked = True


class Renewed(Callback):
    """Makes new optimisers in the middle of training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("held_out", [0.25, "train"])
@pytest.mark.parametrize("how", ["hookless", "renewed"])
def test_pruned_weights_are_zero_in_each_validation_whatever_steps_them(how, held_out):
    found = []

    class Checked(Net):
        def validation_step(self, batch):
            found.append((sparsity(self), callback.sparsity))

        def configure_optimizers(self):
            return (Hookless if how == "hookless" else torch.optim.AdamW)(self.parameters(), 0.01)

    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    options = {"val": loader(8), "epochs": 6, "num_sanity_val_steps": 0}
    fit([callback, Renewed()] if how == "renewed" else callback, model=Checked(), **options)
    assert len(found) == 6
    assert all(real == claimed for real, claimed in found)
    assert found[-1][0] == pytest.approx(0.8, abs=0.01)
    assert callback._run.gradients.last == callback._run.pruner.phases.end - 1
