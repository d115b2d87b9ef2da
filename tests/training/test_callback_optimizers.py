"""Pruned weights stay zero whatever steps them."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_autoprune import AutoPruneCallback, sparsity


class Hookless(torch.optim.SGD):
    """Calls no hooks, as a wrapper of another optimizer may; moves all weights."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for weight in self.param_groups[0]["params"]:
            weight.sub_(0.05 * weight.grad + 0.001)
        return loss

    step.hooked = True


class Renewed(Callback):
    """Makes new optimizers in the middle of training."""

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


class Manual(Net):
    """Two optimizers that step after one backward: one of the pruned weights, one of the rest."""

    def __init__(self, order=(0, 1), wrapped=True):
        super().__init__()
        self.automatic_optimization, self.order, self.wrapped = False, order, wrapped

    def configure_optimizers(self):
        matrices = [p for p in self.parameters() if p.dim() > 1]
        return [torch.optim.Adam(ps, 0.01) for ps in (matrices, [p for p in self.parameters() if p.dim() == 1])]

    def training_step(self, batch):
        optimizers = self.optimizers(use_pl_optimizer=self.wrapped)
        for each in optimizers:
            each.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for i in self.order:
            optimizers[i].step()


def trained(model, **options):
    callback = AutoPruneCallback(target_sparsity=0.8, log_every_n_steps=1, **options)
    fit(callback, model=model, epochs=10)
    return callback, dict(model.state_dict())


LOSS = {"loss_fn": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])}


@pytest.mark.parametrize("options", [{"held_out": "train"}, LOSS], ids=["train", "loss_fn"])
def test_the_order_in_which_optimizers_step_does_not_matter(options):
    torch.manual_seed(0)
    callback, first = trained(Manual(), **options)
    torch.manual_seed(0)
    _, last = trained(Manual(order=(1, 0)), **options)
    assert same(first, last)
    assert sum(layer.revived for layer in callback.layers()) > 20


@pytest.mark.parametrize("options", [{"held_out": "train"}, LOSS], ids=["train", "loss_fn"])
def test_optimizers_that_are_stepped_past_lightning_are_followed(options, recwarn):
    torch.manual_seed(0)
    _, wrapped = trained(Manual(), **options)
    torch.manual_seed(0)
    _, bare = trained(Manual(wrapped=False), **options)
    assert same(wrapped, bare)
    assert not [w for w in recwarn if "No loss so far depends" in str(w.message)]


class Centred(Net):
    """Writes to its weights in hooks of its own, which come after the callbacks'."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        self.first.weight -= self.first.weight.mean(1, keepdim=True)

    def training_step(self, batch):
        self.seen.append(sparsity(self.first.weight))
        return super().training_step(batch)

    def validation_step(self, batch):
        self.seen.append(sparsity(self.first.weight))


def test_what_hooks_of_the_module_write_to_pruned_weights_is_zeroed_before_it_is_used_or_saved(tmp_path):
    callback, model, path = AutoPruneCallback(target_sparsity=0.8), Centred(), ModelCheckpoint(tmp_path, save_last=True)
    fit([callback, path], model=model, val=loader(), enable_checkpointing=True)
    assert model.seen[-1] == callback.layer_sparsity()["first"] > 0.5
    saved = torch.load(path.last_model_path, weights_only=True)["state_dict"]
    assert sparsity({name: saved[f"{name}.weight"] for name in ("first", "last")}) == callback.sparsity
