"""The callback in a real Trainer: what it prunes, and what it refuses."""

from __future__ import annotations

import warnings
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from helpers import Net, data, fit, loader, trainer
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity

FRACTION, FIXED, LOADER = {"held_out": 0.5}, {"held_out": 0.25, "redraw_held_out": False}, {"held_out": loader(seed=5)}
SOURCES = [FRACTION, FIXED, LOADER, {"held_out": "val"}, {"held_out": "train"}]


@pytest.mark.parametrize("source", SOURCES, ids=str)
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
            seen.append(torch.cat([mask.flatten() for mask in self._pruner.masks()]))

    fit(Watch(target_sparsity=0.8, mask_every_n_steps=every, warmup=0.0), epochs=4)
    changes = [i + 1 for i, (a, b) in enumerate(pairwise(seen)) if not torch.equal(a, b)]
    assert len(changes) > 3
    end = 32 - round(0.34 * 32) - 1  # the exact correction at the freeze
    assert all((i + 1) % every == 0 or i == end for i in changes)


def test_rows_held_out_are_not_trained_on_in_the_same_step_and_none_is_lost():
    steps = []

    class Record(Net):
        def training_step(self, batch):
            steps.append((self.trainer.global_step, batch[0][:, 0].tolist()))
            return super().training_step(batch)

    fit(AutoPruneCallback(warmup=0.0, finetune=0.0), model=Record(), epochs=1)
    by_rows = [rows for _, rows in steps]
    assert [len(rows) for rows in by_rows] == [8] * 16  # each batch of 16 rows: half to W, half to M
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
def test_gradient_accumulation_counts_optimiser_steps(source):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    _, t = fit(callback, epochs=6, accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert callback._pruner.step == t.global_step == 18
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


def cross_entropy(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


@pytest.mark.parametrize("options", [{"loss_fn": cross_entropy}, {"held_out": "train"}], ids=["loss_fn", "train"])
def test_manual_optimisation_works_with_a_loss_function_or_without_held_out_data(options):
    callback = AutoPruneCallback(target_sparsity=0.8, **options)
    model, _ = fit(callback, model=Manual(), epochs=4)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_second_fit_starts_anew_from_the_pruned_model():
    callback = AutoPruneCallback(target_sparsity=0.5)
    model, _ = fit(callback)
    callback.__init__(target_sparsity=0.8)
    fit(callback, model=model)
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_the_same_callback_can_be_used_for_another_fit():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.25, redraw_held_out=False)
    for _ in range(2):
        model, _t = fit(callback)
        assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.01)
        assert callback._pruner.step == 24


def test_nothing_of_the_callback_is_left_in_trainer_or_optimiser():
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


def test_fast_dev_run_and_validation_within_an_epoch_work():
    fit(AutoPruneCallback(target_sparsity=0.5), val=loader(seed=3), fast_dev_run=True)
    callback = AutoPruneCallback(target_sparsity=0.5)
    model, _ = fit(callback, val=loader(seed=3), val_check_interval=3)
    assert sparsity(model) == 0.5


def test_max_steps_gives_the_length_of_the_run():
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, epochs=-1, max_steps=20)
    assert callback._pruner.phases.total == 20
    assert callback.sparsity == 0.5


def test_training_that_ends_early_says_so():
    class Stop(Net):
        def on_train_batch_end(self, *_):
            self.trainer.should_stop = self.trainer.global_step == 12

    with pytest.warns(UserWarning, match=r"ended after 12 of 32 steps, before the masks were frozen: sparsity is \d"):
        fit(AutoPruneCallback(target_sparsity=0.9), model=Stop())


# Losses that can't be used


class BadLoss:
    """A held-out loss that is NaN in some calls."""

    def __init__(self, bad) -> None:
        self.calls, self.bad = 0, bad

    def __call__(self, module, batch):
        self.calls += 1
        return cross_entropy(module, batch) * (float("nan") if self.bad(self.calls) else 1)


def test_one_bad_held_out_loss_is_warned_about_and_training_goes_on():
    callback = AutoPruneCallback(target_sparsity=0.8, loss_fn=BadLoss(lambda call: call == 3))
    with pytest.warns(UserWarning, match="At training step 6 the held-out loss is nan, not finite: no auxiliary step"):
        fit(callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_ten_bad_held_out_losses_in_a_row_stop_training():
    callback = AutoPruneCallback(loss_fn=BadLoss(lambda call: call > 2))
    with pytest.raises(AutoPruneError, match="step 15 the held-out loss is nan, not finite, for the 10th time"):
        fit(callback)


def test_nine_bad_losses_a_good_one_and_nine_bad_ones_are_survived():
    callback = AutoPruneCallback(loss_fn=BadLoss(lambda call: call % 10 != 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, epochs=8)


def test_a_training_step_without_a_loss_is_named():
    class Nothing(Net):
        def training_step(self, batch):
            return None if "log" in vars(self) else super().training_step(batch)  # None in the shield

    with pytest.raises(AutoPruneError, match="the held-out loss is None, not a tensor, for the 10th time"):
        fit(AutoPruneCallback(), model=Nothing())


# What is refused before training starts


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class LBFGS(Net):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Biases(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([self.first.bias, self.last.bias], 0.1)


class NoOptimizer(Net):
    def configure_optimizers(self):
        return None


class Other(AutoPruneCallback):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"held_out": 0.0},
            r'`held_out` is 0.0; it must be a number in \(0, 1\). `held_out` may also be "val", ',
        ),
        ({"held_out": 1.0}, r"`held_out` is 1.0; it must be a number in \(0, 1\)"),
        ({"held_out": 1}, r"`held_out` is 1; it must be a number in \(0, 1\)"),
        ({"held_out": "test"}, "`held_out` is 'test'; allowed are 'val', 'train'"),
        ({"held_out": [1]}, r"`held_out` is \[1\]; it must be a number"),
        ({"log_every_n_steps": 0}, r"`log_every_n_steps` is 0; it must be a number in \[1, inf\)"),
        ({"target_sparsity": 1}, r"`target_sparsity` is 1; it must be a number in \[0, 1\)"),
        ({"warmup": 0.5, "finetune": 0.5}, "leave no time to prune"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(options, message):
    with pytest.raises(AutoPruneError, match=message):
        AutoPruneCallback(**options)


class Forgetful(Net):
    """Fails if a single training step is taken."""

    def training_step(self, batch):
        raise AssertionError("training started")


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (AutoPruneCallback(), {"model": LBFGS()}, "LBFGS evaluates the loss several times within one step"),
        (
            AutoPruneCallback(),
            {"model": Biases()},
            r"No optimiser trains any of the prunable weights \(first, last\)",
        ),
        (AutoPruneCallback(), {"model": NoOptimizer()}, "No optimiser trains any of the prunable weights"),
        (
            AutoPruneCallback(),
            {"model": Manual()},
            r"Manual uses manual optimisation: its `training_step` takes .* Pass `loss_fn`, or `held_out=\"train\"`.",
        ),
        (
            AutoPruneCallback(include=["fc*"]),
            {},
            r"`include` has 'fc\*', which matches no layer; there are 'first',",
        ),
        (AutoPruneCallback(), {"train": DataLoader(Stream(), 16)}, "training data is an IterableDataset.*: pass `held"),
        (
            AutoPruneCallback(held_out=0.5, redraw_held_out=False),
            {"train": DataLoader(Stream(), 16)},
            r"training data is an IterableDataset.*: pass `held_out=DataLoader\(...\)`",
        ),
        (
            AutoPruneCallback(held_out=0.02),
            {},
            "`held_out=0.02` of a training batch of 16 rows leaves one side",
        ),
        (
            AutoPruneCallback(held_out=0.001, redraw_held_out=False),
            {},
            "`held_out=0.001` of 128 training rows holds 0 out and leaves 128 to train on",
        ),
        (AutoPruneCallback(held_out="val"), {}, '`held_out="val"` needs validation data, and this fit has none'),
        ([AutoPruneCallback(), Other()], {}, "The Trainer has two AutoPrune callbacks, which would prune the same"),
        (AutoPruneCallback(), {"epochs": -1}, "whose length is not known: set `max_steps` of the Trainer"),
        (AutoPruneCallback(target_sparsity=0.999), {}, "Keeping 0 of 256 weights is not possible"),
    ],
)
def test_what_can_not_work_is_refused_before_the_first_step(callback, options, message):
    with pytest.raises(AutoPruneError, match=message):
        fit(callback, **{"model": Forgetful(), **options})


def test_two_callbacks_of_the_same_class_are_refused_by_lightning_itself():
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `AutoPruneCallback`"):
        trainer(callbacks=[AutoPruneCallback(), AutoPruneCallback()])


class Module(LightningDataModule):
    def setup(self, stage):
        self.ready = True

    def train_dataloader(self):
        assert self.ready
        return loader()


@pytest.mark.parametrize("source", [FRACTION, FIXED], ids=str)
def test_a_data_module_and_loaders_that_are_loaded_anew_work(source):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    model = Net()
    trainer(callbacks=[callback], epochs=4, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=Module())
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
