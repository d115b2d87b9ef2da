"""Pruned weights stay zero, whichever optimizer or hook writes to them."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, held_out_loss, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_autoprune import AutoPruneCallback, sparsity


class Hookless(torch.optim.SGD):
    """An optimizer that calls no hooks, as wrappers of other optimizers may, and moves all weights."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        for weight in self.param_groups[0]["params"]:
            weight.sub_(0.05 * weight.grad + 0.001)
        return loss

    step.hooked = True


class OptimizerReplacer(Callback):
    """A callback that creates new optimizers in the middle of training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)


@pytest.mark.parametrize("held_out", [0.25, "train"])
@pytest.mark.parametrize("kind", ["hookless", "replaced"])
def test_pruned_weights_are_zero_in_every_validation(kind, held_out):
    sparsities = []

    class SparsityRecorder(Net):
        def validation_step(self, batch):
            sparsities.append((sparsity(self), callback.sparsity))

        def configure_optimizers(self):
            return (Hookless if kind == "hookless" else torch.optim.AdamW)(self.parameters(), 0.01)

    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    options = {"val": loader(8), "epochs": 6, "num_sanity_val_steps": 0}
    fit([callback, OptimizerReplacer()] if kind == "replaced" else callback, model=SparsityRecorder(), **options)
    assert len(sparsities) == 6
    assert all(actual == reported for actual, reported in sparsities)
    assert sparsities[-1][0] == pytest.approx(0.8, abs=0.01)
    assert callback._run.auxiliary_steps.last == callback._run.pruner.phases.end - 1


class SharedBackwardNet(Net):
    """A model with two optimizers that step after one backward pass: of prunable weights, and of other parameters."""

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


def fit_and_get_state(model, **options):
    # a short run, which moves M little at the default
    callback = AutoPruneCallback(target_sparsity=0.8, auxiliary_lr=3000, log_every_n_steps=1, **options)
    fit(callback, model=model, epochs=10)
    return callback, dict(model.state_dict())


def test_the_order_of_the_optimizers_steps_does_not_matter():
    torch.manual_seed(0)
    callback, first = fit_and_get_state(SharedBackwardNet(), held_out="train")
    torch.manual_seed(0)
    _, last = fit_and_get_state(SharedBackwardNet(order=(1, 0)), held_out="train")
    assert same(first, last)
    assert sum(layer.revived for layer in callback.layers()) > 20


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_m_follows_both_gradients_in_any_order_of_the_optimizers_steps(order):
    """The held-out pass comes before the step of the optimizer that trains the weights, wherever that is."""
    seen = []

    def loss_fn(module, batch):
        seen.append(module.first.weight.clone())
        return held_out_loss(module, batch)

    class WeightRecorder(SharedBackwardNet):
        def training_step(self, batch):
            before, passes = self.first.weight.clone(), len(seen)
            super().training_step(batch)
            if len(seen) > passes:  # not in the dense phase
                assert torch.equal(seen[-1], before)
                assert not torch.equal(seen[-1], self.first.weight)

    callback, _ = fit_and_get_state(WeightRecorder(order), loss_fn=loss_fn)
    phases = callback._run.pruner.phases
    assert len(seen) >= phases.end - phases.start
    assert callback._run.auxiliary_steps.last == phases.end - 1
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("options", [{"held_out": "train"}, {"loss_fn": held_out_loss}], ids=["train", "loss_fn"])
def test_optimizers_stepped_without_lightnings_wrapper_are_followed(options, recwarn):
    torch.manual_seed(0)
    _, wrapped = fit_and_get_state(SharedBackwardNet(), **options)
    torch.manual_seed(0)
    _, bare = fit_and_get_state(SharedBackwardNet(wrapped=False), **options)
    assert same(wrapped, bare)
    assert not [w for w in recwarn if "No loss so far depends" in str(w.message)]


class CenteredNet(Net):
    """A model that writes to its weights in its own hooks, which run after those of callbacks."""

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


def test_pruned_weights_that_module_hooks_change_are_zeroed_before_use_and_saving(tmp_path):
    callback, model = AutoPruneCallback(target_sparsity=0.8), CenteredNet()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fit([callback, checkpoint], model=model, val=loader(), enable_checkpointing=True)
    assert model.seen[-1] == callback.layer_sparsity()["first"] > 0.5
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["state_dict"]
    assert sparsity({name: saved[f"{name}.weight"] for name in ("first", "last")}) == callback.sparsity
