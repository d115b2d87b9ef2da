"""Options of the Trainer, the Tuner and other callbacks, each together with pruning."""

from __future__ import annotations

import pytest
import torch
from helpers import BATCH, ROWS, Net, csv_logger, data, fit, flat, loader, rows, trainer
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune import AutoPruneCallback, sparsity

STEPS = ROWS // BATCH  # per epoch


class Tuned(Net):
    lr = 0.01

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


class Counting(Callback):
    """Notes the steps of the pruner, the length that it expects, and counts the steps of M."""

    def __init__(self, callback):
        self.callback, self.auxiliary = callback, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        pruner = self.callback._run.pruner
        self.step, self.total = pruner.step, pruner.phases.total
        self.auxiliary += self.callback._run.auxiliary_steps.last == pruner.step - 1


def pruned(options=None, **more):
    """Fit, check that the target is met with final masks, and return the counts, the model and the trainer."""
    callback = AutoPruneCallback(target_sparsity=0.8, **(options or {}))
    counting = Counting(callback)
    model, t = fit([callback, counting, *more.pop("callbacks", [])], **more)
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)
    assert callback._run.pruner.masks_final
    return counting, model, t


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 8 * STEPS),
        ({"limit_train_batches": 5}, 8 * 5),
        ({"limit_train_batches": 0.5}, 8 * STEPS // 2),
        ({"limit_val_batches": 1, "val": loader()}, 8 * STEPS),
        ({"val_check_interval": 0.25, "val": loader(32)}, 8 * STEPS),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None, "val": loader(32)}, 8 * STEPS),
        ({"max_time": "00:01:00:00"}, 8 * STEPS),
        ({"max_steps": 30}, 30),
        ({"overfit_batches": 4}, 8 * 4),
        ({"profiler": "simple"}, 8 * STEPS),
        ({"accumulate_grad_batches": 2}, 8 * STEPS // 2),
        ({"accumulate_grad_batches": 3}, 8 * 3),  # and a remainder
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 8 * STEPS),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}, 8 * STEPS),
        ({"reload_dataloaders_every_n_epochs": 1}, 8 * STEPS),
        ({"num_sanity_val_steps": 2, "val": loader(32)}, 8 * STEPS),
        ({"detect_anomaly": True}, 8 * STEPS),
        ({"inference_mode": False, "val": loader(32)}, 8 * STEPS),
        ({"barebones": True, "logger": None, "enable_checkpointing": None, "log_every_n_steps": None}, 8 * STEPS),
    ],
)
def test_a_run_takes_the_steps_that_the_options_give_and_meets_the_target(options, steps):
    counting, _, _ = pruned(epochs=8, **options)
    assert counting.step == counting.total == steps
    assert counting.auxiliary > 0.3 * steps


@pytest.mark.parametrize("schedule", [{0: 4, 4: 1}, {0: 1, 3: 2, 6: 3}])
@pytest.mark.parametrize("held_out", [0.25, "train"])
def test_gradient_accumulation_can_follow_a_schedule(schedule, held_out):
    scheduler = GradientAccumulationScheduler(schedule)
    counting, _, _ = pruned({"held_out": held_out}, callbacks=[scheduler], epochs=8)
    factors = [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(8)]
    assert counting.step == counting.total == sum(-(-STEPS // factor) for factor in factors)


def test_an_accumulation_schedule_works_with_data_of_unknown_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(list(data()))

    scheduler = GradientAccumulationScheduler({0: 2, 2: 1})
    options = {"train": DataLoader(Stream(), BATCH), "epochs": 20, "max_steps": 40}
    counting, _, _ = pruned({"held_out": "train"}, callbacks=[scheduler], **options)
    assert counting.step == counting.total == 40


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
@pytest.mark.parametrize("held_out", ["train", "loader"])
def test_several_training_loaders_side_by_side(mode, held_out):
    class Both(Net):
        def training_step(self, batch):
            parts = [part for part in batch.values() if part is not None] if isinstance(batch, dict) else [batch]
            return sum(torch.nn.functional.cross_entropy(self(x), y) for x, y in parts)

    both = CombinedLoader({"a": loader(), "b": loader(64, seed=3)}, mode)
    held = DataLoader(data(64, seed=5), BATCH) if held_out == "loader" else "train"
    counting, _, _ = pruned({"held_out": held}, model=Both(), train=both, epochs=8)
    assert counting.step == 8 * (STEPS if mode == "max_size_cycle" else 4)


def test_the_learning_rate_finder_leaves_no_trace():
    seed_everything(0, verbose=False)
    callback, model = AutoPruneCallback(target_sparsity=0.8), Tuned()
    before = flat(model)
    t = trainer(epochs=8, callbacks=[callback], enable_checkpointing=True)
    Tuner(t).lr_find(model, loader(), num_training=20)
    assert torch.equal(flat(model), before)
    assert callback.sparsity == 0
    assert callback.state_dict() == {}
    t.fit(model, loader())
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)
    assert callback._run.pruner.phases.total == callback._run.pruner.step == 8 * STEPS


def test_a_learning_rate_finder_in_the_next_fit_does_not_bring_back_the_last_one():
    callback, curve = AutoPruneCallback(target_sparsity=0.8, warmup=0.25), []

    class Watch(Callback):
        def on_train_batch_end(self, *_):
            curve.append(callback.sparsity)

    fit(callback, Tuned())
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit([callback, Watch(), finder], Tuned(), enable_checkpointing=True)
    assert len(curve) == callback._run.pruner.step == 4 * STEPS
    assert not any(curve[: STEPS - 1])


class FindAgain(LearningRateFinder):
    """Looks for a learning rate in the middle of training; it saves the run before, and restores it after."""

    def __init__(self, epoch):
        super().__init__(num_training_steps=5, update_attr=False)
        self.epoch = epoch

    def on_fit_start(self, *_):
        """Do not look before training."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("epoch", [0, 2, 5])
def test_a_run_that_was_restored_in_the_middle_saves_its_own_state_later(epoch):
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit([callback, FindAgain(epoch)], Tuned(), epochs=6, enable_checkpointing=True)
    state = callback.state_dict()["pruner"]
    assert (state["step"], state["auxiliary"]["frozen"]) == (6 * STEPS, True)
    assert sparsity(model) == callback.sparsity == pytest.approx(0.8, abs=0.005)


def test_the_batch_size_finder_leaves_no_trace():
    class Sized(Net):
        batch_size = 8

        def train_dataloader(self):
            return DataLoader(data(), self.batch_size)

        def val_dataloader(self):
            return loader(32)

    seed_everything(0, verbose=False)
    callback, model = AutoPruneCallback(target_sparsity=0.8), Sized()
    before = flat(model)
    t = trainer(epochs=8, callbacks=[callback], enable_checkpointing=True)
    Tuner(t).scale_batch_size(model, max_trials=2, steps_per_trial=2)
    assert torch.equal(flat(model), before)
    assert callback.sparsity == 0
    assert model.batch_size == 4
    t.fit(model)
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)


def test_validating_testing_and_predicting_before_and_after_change_nothing():
    class Whole(Net):
        def test_step(self, batch):
            self.validation_step(batch)

        def predict_step(self, batch):
            return self(batch[0])

    def run(others):
        seed_everything(1, verbose=False)
        model, t = Whole(), trainer(epochs=6, callbacks=[AutoPruneCallback(target_sparsity=0.8)])
        for _ in range(2):
            if others:
                t.validate(model, loader(32), verbose=False)
                t.test(model, loader(32), verbose=False)
                t.predict(model, loader(32))
                assert t.callbacks[0]._run is None or not t.callbacks[0]._run.is_training
            if not hasattr(t, "fitted"):
                seed_everything(2, verbose=False)
                t.fit(model, loader())
                t.fitted = True
        return flat(model)

    assert torch.equal(run(True), run(False))


def test_several_checkpoints_and_a_learning_rate_monitor(tmp_path):
    several = [
        ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="autoprune/sparsity", mode="max"),
        ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=10, save_top_k=-1),
        ModelCheckpoint(tmp_path / "last", save_last=True, save_weights_only=True),
        LearningRateMonitor("step"),
    ]
    options = {"enable_checkpointing": True, "logger": csv_logger(tmp_path / "logs")}
    _, model, _ = pruned(callbacks=several, epochs=8, **options)
    (best,) = (tmp_path / "best").iterdir()
    for path in (best, tmp_path / "steps" / "step=60.ckpt", tmp_path / "last" / "last.ckpt"):
        other = Net()
        other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert sparsity(other) > 0.795
    assert torch.equal(flat(other), flat(model))
    assert len(rows(tmp_path / "logs")) > 10


def test_fast_dev_run_and_validation_within_an_epoch_work():
    fit(AutoPruneCallback(target_sparsity=0.5), val=loader(seed=3), fast_dev_run=True)
    callback = AutoPruneCallback(target_sparsity=0.5)
    model, _ = fit(callback, val=loader(seed=3), val_check_interval=3)
    assert sparsity(model) == 0.5


def test_max_steps_gives_the_length_of_the_run():
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, epochs=-1, max_steps=20)
    assert callback._run.pruner.phases.total == 20
    assert callback.sparsity == 0.5


class Module(LightningDataModule):
    def setup(self, stage):
        self.ready = True

    def train_dataloader(self):
        assert self.ready
        return loader()


@pytest.mark.parametrize("source", [{"held_out": 0.5}, {"held_out": 0.25, "redraw_held_out": False}], ids=str)
def test_a_data_module_and_loaders_that_are_loaded_anew_work(source):
    callback = AutoPruneCallback(target_sparsity=0.8, **source)
    model = Net()
    trainer(callbacks=[callback], epochs=4, reload_dataloaders_every_n_epochs=1).fit(model, datamodule=Module())
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
