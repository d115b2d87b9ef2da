"""The callback in a real Trainer: what it prunes and when, and that it leaves nothing behind."""

from __future__ import annotations

import inspect
from dataclasses import fields
from itertools import chain, pairwise

import pytest
import torch
from helpers import Net, data, fit, held_out_loss, loader, trainer
from manual_models import ManualNet, TwoOptimizersNet

from lightning_autoprune import AutoPruneCallback, Settings, sparsity

SOURCES = {
    "redrawn": {"held_out": 0.5},
    "fixed": {"held_out": 0.25, "redraw_held_out": False},
    "loader": {"held_out": loader(seed=5)},
    "val": {"held_out": "val"},
    "train": {"held_out": "train"},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_source_of_held_out_data_prunes_to_the_target(source, shuffle):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    model, _ = fit(callback, train=loader(shuffle=shuffle), val=loader(seed=3), epochs=6)
    assert callback.sparsity == pytest.approx(0.8, abs=0.5 / 256)
    assert sparsity(model) == callback.sparsity
    assert callback.layer_sparsity().keys() == {"first", "last"}


def test_the_defaults_prune_and_the_model_still_learns():
    callback = AutoPruneCallback()
    model, _ = fit(callback, model=Net(hidden=64), train=loader(rows=512), epochs=40)
    x, y = data(512)[:]
    error = (model.eval()(x).argmax(1) != y).float().mean()
    assert 0.3 < callback.sparsity < 1
    assert error < 0.15


def test_the_callback_has_the_defaults_of_the_settings():
    arguments = inspect.signature(AutoPruneCallback).parameters
    assert {f.name: f.default for f in fields(Settings)} == {
        f.name: arguments[f.name].default for f in fields(Settings)
    }


def test_excluded_layers_stay_dense():
    callback = AutoPruneCallback(target_sparsity=0.8, exclude=["last"])
    model, _ = fit(callback, epochs=4)
    assert (model.last.weight != 0).all()
    assert sparsity(model.first.weight) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("every", [2, 5])
def test_masks_change_only_every_n_steps(every):
    masks = []

    class MaskRecorder(AutoPruneCallback):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            masks.append(torch.cat([mask.flatten() for mask in self._run.pruner.masks()]))

    fit(MaskRecorder(target_sparsity=0.8, mask_every_n_steps=every, warmup=0.0, finetune=0.45), epochs=4)
    changes = [i + 1 for i, (a, b) in enumerate(pairwise(masks)) if not torch.equal(a, b)]
    assert len(changes) > 3
    last = 32 - round(0.45 * 32) - 1  # the step that makes the masks final may correct them
    assert all((i + 1) % every == 0 or i == last for i in changes)


def test_held_out_samples_are_not_trained_on_in_the_same_step_and_none_is_lost():
    batches = []

    class SampleRecorder(Net):
        def training_step(self, batch):
            batches.append(batch[0][:, 0].tolist())
            return super().training_step(batch)

    fit(AutoPruneCallback(warmup=0.0, finetune=0.0), model=SampleRecorder(), epochs=1)
    whole, rest, held_out = batches[:3]  # the trial of the split
    assert sorted(whole) == sorted(rest + held_out)
    del batches[:3]
    assert [len(samples) for samples in batches] == [12, 4] * 8  # a quarter of each batch of 16 samples is held out
    assert sorted(chain(*batches)) == sorted(data()[:][0][:, 0].tolist())


def test_a_fixed_held_out_split_is_trained_on_only_once_masks_are_final():
    trained = {}

    class SampleRecorder(Net):
        def training_step(self, batch):
            if "log" not in vars(self):  # the held-out pass replaces `log`
                trained.setdefault(self.trainer.current_epoch, set()).update(batch[0][:, 0].tolist())
            return super().training_step(batch)

    callback = AutoPruneCallback(held_out=0.25, redraw_held_out=False, warmup=0.25, finetune=0.5)
    fit(callback, model=SampleRecorder(), epochs=12)
    before = set().union(*(samples for epoch, samples in trained.items() if epoch < 6))
    after = set().union(*(samples for epoch, samples in trained.items() if epoch >= 6))
    assert len(before) == 96
    assert len(after) == 128


def test_the_last_batch_of_an_epoch_may_be_too_small_to_split():
    """It has two samples, the fewest that BatchNorm can train on."""
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, train=loader(rows=34, batch=16), epochs=6)
    assert callback.sparsity == pytest.approx(0.5, abs=0.01)


def test_batches_of_different_sizes_are_split():
    class MixedSizes:
        def __len__(self):
            return 6

        def __iter__(self):
            sizes = [64, 8, 8, 8, 8, 2]
            return (tuple(x[:n] for x in data()[:]) for n in sizes)

    for train_gradients, updates in ((None, 18), (False, 15)):  # nothing is held out of the batches of two samples
        callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0, train_gradients=train_gradients)
        fit(callback, train=MixedSizes(), epochs=3)
        assert callback._run.pruner.auxiliary.scale.updates == updates


@pytest.mark.parametrize("source", [SOURCES["redrawn"], SOURCES["train"]], ids=["redrawn", "train"])
def test_gradient_accumulation_counts_optimizer_steps(source):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    _, t = fit(callback, epochs=6, accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert callback._run.pruner.step == t.global_step == 18
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("samples", "accumulate"), [(48, 4), (80, 4)])
def test_the_last_step_of_an_epoch_is_followed_by_an_auxiliary_step(samples, accumulate):
    """Lightning steps on the last batch, even if fewer batches than usual have been accumulated."""
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0)
    _, t = fit(callback, train=loader(rows=samples), epochs=6, accumulate_grad_batches=accumulate)
    assert callback._run.pruner.auxiliary.scale.updates == t.global_step


def test_gradients_are_masked_before_they_are_clipped():
    counts = []

    class NonzeroCounter(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            counts.append([float(((p.grad != 0) & (p == 0)).sum()) for p in (self.first.weight, self.last.weight)])
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    fit(AutoPruneCallback(target_sparsity=0.9), model=NonzeroCounter(), gradient_clip_val=1.0)
    assert counts[-1] == [0, 0]
    assert all(count == [0, 0] for count in counts)


@pytest.mark.parametrize("options", [{"loss_fn": held_out_loss}, {"held_out": "train"}], ids=["loss_fn", "train"])
def test_manual_optimization_works_with_a_loss_function_or_without_held_out_data(options):
    callback = AutoPruneCallback(target_sparsity=0.8, **options)
    model, _ = fit(callback, model=ManualNet(), epochs=4)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_m_steps_once_per_training_step_with_the_optimizer_of_the_weights():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="train", warmup=0.0, finetune=0.0)
    fit(callback, model=TwoOptimizersNet(), epochs=2)
    assert callback._run.pruner.auxiliary.scale.updates == callback._run.pruner.step == 16


def test_a_pruned_model_can_be_pruned_further():
    model, _ = fit(AutoPruneCallback(target_sparsity=0.5))
    fit(AutoPruneCallback(target_sparsity=0.8), model=model)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_weights_that_the_user_clips_stay_clipped():
    class ClippedNet(Net):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            for weight in (self.first.weight, self.last.weight):
                weight.data.clamp_(-0.05, 0.05)

        def on_train_batch_end(self, *_):
            assert max(w.abs().max() for w in (self.first.weight, self.last.weight)) <= 0.05

    fit(AutoPruneCallback(target_sparsity=0.8), model=ClippedNet())


def test_the_target_is_met_if_a_layer_is_frozen_during_training():
    class FreezingNet(Net):
        def on_train_epoch_start(self):
            self.first.requires_grad_(self.current_epoch < 2)

    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, model=FreezingNet(), epochs=6)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_gradient_hooks_do_not_fire_in_the_held_out_pass():
    def count_calls(callback):
        model, calls = Net(), []
        model.first.weight.register_hook(lambda gradient: calls.append(1))
        fit(callback, model=model)
        return len(calls)

    assert count_calls(AutoPruneCallback()) == count_calls(None) == 32


def test_a_callback_can_be_used_for_a_second_fit():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.25, redraw_held_out=False)
    for _ in range(2):
        model, _t = fit(callback)
        assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
        assert callback._run.pruner.step == 24


def test_the_callback_leaves_nothing_in_trainer_or_optimizer():
    _, t = fit(AutoPruneCallback(held_out=0.25, redraw_held_out=False))
    assert "dataloader" not in vars(t.fit_loop._data_source)
    _, t = fit(AutoPruneCallback())
    assert "batch_to_device" not in vars(t.strategy)
    assert not t.optimizers[0]._optimizer_step_post_hooks


def test_the_callback_leaves_nothing_after_an_error_in_training():
    class FailingNet(Net):
        def training_step(self, batch):
            if self.trainer.global_step == 5:
                raise RuntimeError("the user's own error")
            return super().training_step(batch)

    t = trainer(callbacks=[AutoPruneCallback()])
    with pytest.raises(RuntimeError, match="the user's own error"):
        t.fit(FailingNet(), loader())
    assert "batch_to_device" not in vars(t.strategy)
    assert not t.optimizers[0]._optimizer_step_post_hooks
