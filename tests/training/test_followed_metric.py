"""The metric that is followed beside the sparsity: which one, and that each value is taken when it is new."""

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
    """What was pruned when each epoch ended, by the step that Lightning logs it at."""

    def __init__(self, pruning: AutoPruneCallback) -> None:
        self.pruning, self.found = pruning, {}

    def on_train_epoch_end(self, trainer, *_):
        self.found[trainer.global_step - 1] = self.pruning.sparsity


def followed(callbacks, model=None, **options):
    """Fits; returns the points that were taken, and the callback."""
    pruning = AutoPruneCallback(target_sparsity=0.7)
    fit([pruning, *callbacks], model, logger=csv_logger(Path("logs")), enable_checkpointing=True, **options)
    return pruning._run.report.history.points, pruning


def logged(name):
    """The steps and values of a metric in the file of a real logger."""
    with Path("logs/metrics.csv").open() as file:
        return [(int(row["step"]), pytest.approx(float(row[name]))) for row in csv.DictReader(file) if row[name]]


class Late(Net):
    """Logs a metric of the training when its epoch ends, after the hooks of most callbacks."""

    def on_train_epoch_end(self):
        self.log("train_late", float(self.current_epoch))


VALIDATED = {
    "no validation": {},
    "validated": {"val": loader(seed=3)},
    "in the epoch": {"val": loader(seed=3), "val_check_interval": 0.5},
    "every second epoch": {"val": loader(seed=3), "check_val_every_n_epoch": 2},
}


@pytest.mark.parametrize("options", VALIDATED.values(), ids=VALIDATED)
@pytest.mark.parametrize("name", ["train_accuracy_epoch", "train_late"])
def test_a_metric_of_the_training_is_taken_in_its_own_epoch(name, options):
    pruning = AutoPruneCallback(target_sparsity=0.7)
    seen, save = Sparsities(pruning), ModelCheckpoint("c", monitor=name, save_on_train_epoch_end=True)
    fit([pruning, save, seen], Late(), logger=csv_logger(Path("logs")), enable_checkpointing=True, **options)
    points = pruning._run.report.history.points
    assert [(step, value) for step, _, value in points] == logged(name)
    assert {step: then for step, then, _ in points} == seen.found
    assert len(points) == 4


@pytest.mark.parametrize("options", [VALIDATED[name] for name in ("validated", "in the epoch", "every second epoch")])
def test_a_metric_of_the_validation_is_taken_when_that_ends(options):
    points, _ = followed([EarlyStopping("val_loss", patience=99)], **options)
    assert [(step, value) for step, _, value in points] == logged("val_loss")


def test_a_metric_of_one_of_several_validation_loaders_is_taken():
    class Two(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch)

    name = "val_loss/dataloader_idx_1"
    points, _ = followed([EarlyStopping(name, patience=99)], Two(), val=[loader(seed=3), loader(seed=4)])
    assert [(step, value) for step, _, value in points] == logged(name)


def test_a_metric_that_the_user_sets_by_hand_is_taken():
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
def test_the_points_of_a_run_that_is_resumed_are_those_of_the_whole_run(name):
    def run(**options):
        other = {"train_accuracy_epoch": "val_loss", "val_loss": "train_accuracy_epoch"}[name]
        stops = [EarlyStopping(metric, strict=False, patience=99) for metric in (name, other)]
        options = {"val": loader(seed=3), "val_check_interval": 0.5, **options}
        return followed([*stops, saving("c", save_on_train_epoch_end=True)], **options)

    whole, pruning = run()
    resumed, again = run(ckpt_path="c/step=16.ckpt")
    assert resumed == whole
    assert again._run.report.history.masks_final_at == pruning._run.report.history.masks_final_at


def test_the_best_since_the_masks_are_final_is_not_one_from_before_that_was_as_sparse_or_sparser():
    history = RunHistory()
    for step, then, value in [(1, 0.0, 0.1), (2, 0.6, 0.2), (3, 0.5, 0.3), (4, 0.5, 0.5), (5, 0.5, 0.4)]:
        history.record_metric("val_loss", step, then, value, masks_final=step >= 4)
    t = trainer(callbacks=[EarlyStopping("val_loss")])
    assert best_values(t, history) == {"best_val_loss": 0.1, "best_pruned_val_loss": 0.4}


def test_a_run_that_ends_before_the_masks_are_final_has_no_best_pruned_value():
    stop = EarlyStopping("val_loss", stopping_threshold=99)
    _, pruning = followed([stop], val=loader(seed=3))
    assert not pruning._run.pruner.masks_final
    assert best_values(trainer(callbacks=[stop]), pruning._run.report.history).keys() == {"best_val_loss"}
