"""The callback in a real Trainer: what it prunes, and what it refuses."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers import Net, data, fit, loader, trainer
from torch import nn

from lightning_autoprune import AutoPruneCallback, Settings, sparsity

FRACTION, FIXED, LOADER = {"held_out": 0.5}, {"held_out": 0.25, "redraw_held_out": False}, {"held_out": loader(seed=5)}
SOURCES = [FRACTION, FIXED, LOADER, {"held_out": "val"}, {"held_out": "train"}]


@pytest.mark.parametrize("source", SOURCES, ids=["redrawn", "fixed", "loader", "val", "train"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_source_of_held_out_data_prunes_to_the_target(source, shuffle):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    model, _ = fit(callback, train=loader(shuffle=shuffle), val=loader(seed=3), epochs=6)
    assert callback.sparsity == pytest.approx(0.8, abs=0.5 / 256)
    assert sparsity(model) == callback.sparsity
    assert callback.layer_sparsity().keys() == {"first", "last"}


def test_defaults_prune_by_themselves_and_the_model_still_learns():
    callback = AutoPruneCallback()
    model, _ = fit(callback, model=Net(hidden=64), train=loader(rows=512), epochs=40)
    x, y = data(512)[:]
    error = (model.eval()(x).argmax(1) != y).float().mean()
    assert 0.3 < callback.sparsity < 1
    assert error < 0.15


def test_the_defaults_are_those_of_the_settings():
    arguments = inspect.signature(AutoPruneCallback).parameters
    assert {f.name: f.default for f in fields(Settings)} == {
        f.name: arguments[f.name].default for f in fields(Settings)
    }


def test_include_and_exclude_choose_layers():
    callback = AutoPruneCallback(target_sparsity=0.8, exclude=["last"])
    model, _ = fit(callback, epochs=4)
    assert (model.last.weight != 0).all()
    assert sparsity(model.first.weight) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("every", [2, 5])
def test_masks_change_only_every_n_steps(every):
    seen = []

    class Watch(AutoPruneCallback):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append(torch.cat([mask.flatten() for mask in self._run.pruner.masks()]))

    fit(Watch(target_sparsity=0.8, mask_every_n_steps=every, warmup=0.0, finetune=0.45), epochs=4)
    changes = [i + 1 for i, (a, b) in enumerate(pairwise(seen)) if not torch.equal(a, b)]
    assert len(changes) > 3
    end = 32 - round(0.45 * 32) - 1  # the exact correction at the freeze
    assert all((i + 1) % every == 0 or i == end for i in changes)


def test_rows_held_out_are_not_trained_on_in_the_same_step_and_none_is_lost():
    steps = []

    class Record(Net):
        def training_step(self, batch):
            steps.append((self.trainer.global_step, batch[0][:, 0].tolist()))
            return super().training_step(batch)

    fit(AutoPruneCallback(warmup=0.0, finetune=0.0), model=Record(), epochs=1)
    by_rows = [rows for _, rows in steps]
    assert [len(rows) for rows in by_rows] == [12, 4] * 8  # each batch of 16 rows: a quarter is held out
    assert sorted(chain(*by_rows)) == sorted(data()[:][0][:, 0].tolist())


def test_a_fixed_part_is_never_trained_on_until_the_masks_are_frozen():
    trained = {}

    class Record(Net):
        def training_step(self, batch):
            if "log" not in vars(self):  # not in the shield
                trained.setdefault(self.trainer.current_epoch, set()).update(batch[0][:, 0].tolist())
            return super().training_step(batch)

    callback = AutoPruneCallback(held_out=0.25, redraw_held_out=False, warmup=0.25, finetune=0.5)
    fit(callback, model=Record(), epochs=12)
    before = set().union(*(rows for epoch, rows in trained.items() if epoch < 6))
    after = set().union(*(rows for epoch, rows in trained.items() if epoch >= 6))
    assert len(before) == 96
    assert len(after) == 128


def test_the_last_rows_of_an_epoch_may_be_too_few_to_split():
    """Two rows are enough for BatchNorm, one is not."""
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, train=loader(rows=34, batch=16), epochs=6)
    assert callback.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("source", [FRACTION, {"held_out": "train"}], ids=str)
def test_gradient_accumulation_counts_optimizer_steps(source):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    _, t = fit(callback, epochs=6, accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert callback._run.pruner.step == t.global_step == 18
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_the_norm_for_clipping_is_of_masked_gradients():
    norms = []

    class Watch(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            norms.append([float(((p.grad != 0) & (p == 0)).sum()) for p in (self.first.weight, self.last.weight)])
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    fit(AutoPruneCallback(target_sparsity=0.9), model=Watch(), gradient_clip_val=1.0)
    assert norms[-1] == [0, 0]
    assert all(norm == [0, 0] for norm in norms)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        opt = self.optimizers()
        opt.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        opt.step()


def test_layers_that_no_loss_depends_on_are_named_when_pruning_begins():
    class Averaged(Net):
        def __init__(self):
            super().__init__()
            self.average = nn.Linear(12, 16)

    with pytest.warns(
        UserWarning, match="No loss so far depends on 'average', so the pressure prunes nearly all of their"
    ):
        fit(AutoPruneCallback(target_sparsity=0.6), model=Averaged())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(AutoPruneCallback(target_sparsity=0.6, exclude=["average"]), model=Averaged())
    assert not any("No loss" in str(w.message) for w in caught)


def cross_entropy(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{"loss_fn": cross_entropy}, {"held_out": "train"}], ids=["loss_fn", "train"])
def test_manual_optimization_works_with_a_loss_function_or_without_held_out_data(options):
    callback = AutoPruneCallback(target_sparsity=0.8, **options)
    model, _ = fit(callback, model=Manual(), epochs=4)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_pruned_model_can_be_pruned_further():
    model, _ = fit(AutoPruneCallback(target_sparsity=0.5))
    fit(AutoPruneCallback(target_sparsity=0.8), model=model)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(("rows", "accumulate"), [(48, 4), (80, 4)])
def test_the_step_at_the_end_of_an_epoch_has_its_auxiliary_step_too(rows, accumulate):
    """Lightning steps on the last batch, whatever is left to accumulate."""
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0)
    _, t = fit(callback, train=loader(rows=rows), epochs=6, accumulate_grad_batches=accumulate)
    assert callback._run.pruner.auxiliary.scale.updates == t.global_step


def test_batches_of_any_size_are_split():
    class Sizes:
        def __len__(self):
            return 6

        def __iter__(self):
            rows = [64, 8, 8, 8, 8, 2]
            return (tuple(x[:n] for x in data()[:]) for n in rows)

    for train_gradients, updates in ((None, 18), (False, 15)):  # nothing is held out of the batches of two rows
        callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0, train_gradients=train_gradients)
        fit(callback, train=Sizes(), epochs=3)
        assert callback._run.pruner.auxiliary.scale.updates == updates


def test_weights_that_the_user_clips_stay_clipped():
    class Clipped(Net):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            for weight in (self.first.weight, self.last.weight):
                weight.data.clamp_(-0.05, 0.05)

        def on_train_batch_end(self, *_):
            assert max(w.abs().max() for w in (self.first.weight, self.last.weight)) <= 0.05

    fit(AutoPruneCallback(target_sparsity=0.8), model=Clipped())


def test_a_layer_that_is_frozen_on_the_way_is_no_trouble():
    class Freezing(Net):
        def on_train_epoch_start(self):
            self.first.requires_grad_(self.current_epoch < 2)

    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, model=Freezing(), epochs=6)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_layers_that_are_not_trained_are_named():
    model = Net()
    model.last.weight.requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"Layers that are not trained \(frozen, or in no optimizer\) stay dense until they are: last"
    ):
        fit(AutoPruneCallback(target_sparsity=0.8), model=model)
    assert (model.last.weight != 0).all()


def test_weights_that_no_optimizer_trains_stay_dense_and_are_named():
    """A teacher, a target network, a backbone under a new head."""

    class Student(Net):
        def __init__(self):
            super().__init__()
            self.teacher = Net()

        def configure_optimizers(self):
            return torch.optim.Adam(self.last.parameters(), 0.01)

    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match=r"stay dense until they are: first, teacher\.first, teacher\.last"):
        model, _ = fit(callback, model=Student())
    assert sparsity(model.last.weight) == pytest.approx(0.8, abs=0.01)
    assert all((w != 0).all() for w in (model.first.weight, model.teacher.first.weight, model.teacher.last.weight))


def test_a_weight_without_a_held_out_gradient_is_warned_about():
    class Checkpointed(Net):
        def forward(self, x):
            hidden = torch.utils.checkpoint.checkpoint(self.first, x.requires_grad_(), use_reentrant=True)
            return self.last(torch.relu(hidden))

    with pytest.warns(UserWarning, match=r"gave no gradient for a weight .* use `use_reentrant=False`"):
        fit(AutoPruneCallback(target_sparsity=0.5), model=Checkpointed())


def test_hooks_on_gradients_do_not_fire_in_the_held_out_pass():
    def calls(callback):
        model, count = Net(), []
        model.first.weight.register_hook(lambda gradient: count.append(1))
        fit(callback, model=model)
        return len(count)

    assert calls(AutoPruneCallback()) == calls(None) == 32


def test_fitting_masks_on_the_validation_data_is_warned_about():
    with pytest.warns(UserWarning, match=r"fits the masks on the data that is reported"):
        fit(AutoPruneCallback(held_out="val"), val=loader(seed=3))


def test_a_pruning_phase_without_auxiliary_steps_is_warned_about():
    with pytest.warns(UserWarning, match="No auxiliary step was taken, so the masks follow the weights' magnitude"):
        fit(AutoPruneCallback(target_sparsity=0.5, mask_every_n_steps=100))


def test_the_same_callback_can_be_used_for_another_fit():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.25, redraw_held_out=False)
    for _ in range(2):
        model, _t = fit(callback)
        assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
        assert callback._run.pruner.step == 24


def test_nothing_of_the_callback_is_left_in_trainer_or_optimizer():
    _, t = fit(AutoPruneCallback(held_out=0.25, redraw_held_out=False))
    assert "dataloader" not in vars(t.fit_loop._data_source)
    _, t = fit(AutoPruneCallback())
    assert "batch_to_device" not in vars(t.strategy)
    assert not t.optimizers[0]._optimizer_step_post_hooks


def test_nothing_is_left_after_an_error_in_training():
    class Failing(Net):
        def training_step(self, batch):
            if self.trainer.global_step == 5:
                raise RuntimeError("the user's own")
            return super().training_step(batch)

    t = trainer(callbacks=[AutoPruneCallback()])
    with pytest.raises(RuntimeError, match="the user's own"):
        t.fit(Failing(), loader())
    assert "batch_to_device" not in vars(t.strategy)
    assert not t.optimizers[0]._optimizer_step_post_hooks


def test_training_that_ends_early_says_so():
    class Stop(Net):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = self.trainer.global_step == 12

    with pytest.warns(UserWarning, match=r"ended after 12 of 32 steps, before the masks were final: sparsity is \d"):
        fit(AutoPruneCallback(target_sparsity=0.9), model=Stop())


class TwoOptimizers(Manual):
    """The second one trains biases only."""

    def training_step(self, batch):
        for opt in self.optimizers():
            opt.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            opt.step()

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.dim() > 1]
        biases = [p for p in self.parameters() if p.dim() == 1]
        return [torch.optim.SGD(weights, 0.05), torch.optim.SGD(biases, 0.05)]


def test_only_the_optimizer_of_the_weights_drives_m_and_once_a_step():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="train", warmup=0.0, finetune=0.0)
    fit(callback, model=TwoOptimizers(), epochs=2)
    assert callback._run.pruner.auxiliary.scale.updates == callback._run.pruner.step == 16
