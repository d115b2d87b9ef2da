"""The metric that is followed beside the sparsity: which one it is, and that each new value is taken once."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from helpers import Net, csv_logger, fit, loader, saving, trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.followed_metric import best_values


class Sparsities(Callback):
    """Notes the sparsity at the end of each epoch, by the step at which Lightning logs the epoch."""

    def __init__(self, pruning: AutoPruneCallback) -> None:
        self.pruning, self.by_step = pruning, {}

    def on_train_epoch_end(self, trainer, *_):
        self.by_step[trainer.global_step - 1] = self.pruning.sparsity


def followed(callbacks, model=None, **options):
    """Fit; return the points that were taken, and the pruning callback."""
    pruning = AutoPruneCallback(target_sparsity=0.7)
    fit([pruning, *callbacks], model, logger=csv_logger(Path("logs")), enable_checkpointing=True, **options)
    return pruning._run.report.history.points, pruning


def logged(name):
    """Return the steps and values of a metric from the file of a real logger."""
    with Path("logs/metrics.csv").open() as file:
        return [(int(row["step"]), pytest.approx(float(row[name]))) for row in csv.DictReader(file) if row[name]]


class LogsLate(Net):
    """Logs a training metric at the end of the epoch, after the hooks of most callbacks."""

    def on_train_epoch_end(self):
        self.log("train_late", float(self.current_epoch))


VALIDATION = {
    "no validation": {},
    "every epoch": {"val": loader(seed=3)},
    "within the epoch": {"val": loader(seed=3), "val_check_interval": 0.5},
    "every second epoch": {"val": loader(seed=3), "check_val_every_n_epoch": 2},
}


@pytest.mark.parametrize("options", VALIDATION.values(), ids=VALIDATION)
@pytest.mark.parametrize("name", ["train_accuracy_epoch", "train_late"])
def test_a_training_metric_is_taken_in_the_epoch_that_logs_it(name, options):
    pruning = AutoPruneCallback(target_sparsity=0.7)
    sparsities, save = Sparsities(pruning), ModelCheckpoint("c", monitor=name, save_on_train_epoch_end=True)
    fit([pruning, save, sparsities], LogsLate(), logger=csv_logger(Path("logs")), enable_checkpointing=True, **options)
    points = pruning._run.report.history.points
    assert [(step, value) for step, _, value in points] == logged(name)
    assert {step: sparsity for step, sparsity, _ in points} == sparsities.by_step
    assert len(points) == 4


@pytest.mark.parametrize("options", [options for options in VALIDATION.values() if options])
def test_a_validation_metric_is_taken_when_the_validation_ends(options):
    points, _ = followed([EarlyStopping("val_loss", patience=99)], **options)
    assert [(step, value) for step, _, value in points] == logged("val_loss")


def test_a_metric_of_one_of_several_validation_loaders_is_followed():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch)

    name = "val_loss/dataloader_idx_1"
    points, _ = followed([EarlyStopping(name, patience=99)], Two(), val=[loader(seed=3), loader(seed=4)])
    assert [(step, value) for step, _, value in points] == logged(name)


def test_a_metric_that_the_user_sets_by_hand_is_followed():
    class Sets(Callback):
        def on_validation_end(self, trainer, *_):
            trainer.callback_metrics["by_hand"] = torch.tensor(float(trainer.current_epoch))

    pruning = AutoPruneCallback(target_sparsity=0.7)
    fit([Sets(), pruning, EarlyStopping("by_hand", patience=99)], val=loader(seed=3))
    assert [value for _, _, value in pruning._run.report.history.points] == [0, 1, 2, 3]


def test_the_first_monitored_metric_that_is_logged_is_followed():
    callbacks = [EarlyStopping("nope", strict=False, patience=99), ModelCheckpoint("c", monitor="val_loss")]
    points, pruning = followed(callbacks, val=loader(seed=3))
    assert [(step, value) for step, _, value in points] == logged("val_loss")
    history = pruning._run.report.history
    t = trainer(callbacks=callbacks, enable_checkpointing=True)
    assert best_values(t, history).keys() == {"best_val_loss", "best_pruned_val_loss"}


@pytest.mark.parametrize("name", ["train_accuracy_epoch", "val_loss"])
def test_a_resumed_run_has_the_same_points_as_one_without_a_break(name):
    def run(**options):
        other = {"train_accuracy_epoch": "val_loss", "val_loss": "train_accuracy_epoch"}[name]
        stops = [EarlyStopping(metric, strict=False, patience=99) for metric in (name, other)]
        options = {"val": loader(seed=3), "val_check_interval": 0.5, **options}
        return followed([*stops, saving("c", save_on_train_epoch_end=True)], **options)

    whole, pruning = run()
    resumed, resumed_pruning = run(ckpt_path="c/step=16.ckpt")
    assert resumed == whole
    assert resumed_pruning._run.report.history.masks_final_at == pruning._run.report.history.masks_final_at


def test_the_best_pruned_value_is_measured_with_final_masks_whatever_the_sparsity_was_before():
    history = RunHistory()
    for step, sparsity, value in [(1, 0.0, 0.1), (2, 0.6, 0.2), (3, 0.5, 0.3), (4, 0.5, 0.5), (5, 0.5, 0.4)]:
        history.record_metric("val_loss", step, sparsity, value, masks_final=step >= 4)
    t = trainer(callbacks=[EarlyStopping("val_loss")])
    assert best_values(t, history) == {"best_val_loss": 0.1, "best_pruned_val_loss": 0.4}


def test_there_is_no_best_pruned_value_if_the_run_ends_before_the_masks_are_final():
    stop = EarlyStopping("val_loss", stopping_threshold=99)
    _, pruning = followed([stop], val=loader(seed=3))
    assert not pruning._run.pruner.masks_final
    assert best_values(trainer(callbacks=[stop]), pruning._run.report.history).keys() == {"best_val_loss"}
