"""The metric that is followed beside the sparsity: which one it is, and that each new value is recorded once."""

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


class SparsityRecorder(Callback):
    """A callback that records the sparsity at the end of each epoch, by the step at which Lightning logs the epoch."""

    def __init__(self, pruning: AutoPruneCallback) -> None:
        self.pruning, self.by_step = pruning, {}

    def on_train_epoch_end(self, trainer, *_):
        self.by_step[trainer.global_step - 1] = self.pruning.sparsity


def fit_and_get_points(callbacks, model=None, **options):
    """Fit a model; return the recorded points and the pruning callback."""
    pruning = AutoPruneCallback(target_sparsity=0.7)
    fit([pruning, *callbacks], model, logger=csv_logger(Path("logs")), enable_checkpointing=True, **options)
    return pruning._run.report.history.points, pruning


def read_logged(name):
    """Return the steps and values of a metric in the file that the logger wrote."""
    with Path("logs/metrics.csv").open() as file:
        return [(int(row["step"]), pytest.approx(float(row[name]))) for row in csv.DictReader(file) if row[name]]


class LateLoggingNet(Net):
    """A model that logs a training metric at the end of the epoch, after the hooks of most callbacks."""

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
def test_a_training_metric_is_recorded_in_the_epoch_that_logs_it(name, options):
    pruning = AutoPruneCallback(target_sparsity=0.7)
    sparsities, save = SparsityRecorder(pruning), ModelCheckpoint("c", monitor=name, save_on_train_epoch_end=True)
    fit(
        [pruning, save, sparsities],
        LateLoggingNet(),
        logger=csv_logger(Path("logs")),
        enable_checkpointing=True,
        **options,
    )
    points = pruning._run.report.history.points
    assert [(step, value) for step, _, value in points] == read_logged(name)
    assert {step: sparsity for step, sparsity, _ in points} == sparsities.by_step
    assert len(points) == 4


@pytest.mark.parametrize("options", list(VALIDATION.values())[1:], ids=list(VALIDATION)[1:])
def test_a_validation_metric_is_recorded_when_validation_ends(options):
    points, _ = fit_and_get_points([EarlyStopping("val_loss", patience=99)], **options)
    assert [(step, value) for step, _, value in points] == read_logged("val_loss")


def test_a_metric_of_one_of_several_validation_loaders_is_followed():
    class TwoLoadersNet(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch)

    name = "val_loss/dataloader_idx_1"
    points, _ = fit_and_get_points(
        [EarlyStopping(name, patience=99)], TwoLoadersNet(), val=[loader(seed=3), loader(seed=4)]
    )
    assert [(step, value) for step, _, value in points] == read_logged(name)


def test_a_metric_that_a_callback_sets_by_hand_is_followed():
    class MetricSetter(Callback):
        def on_validation_end(self, trainer, *_):
            trainer.callback_metrics["by_hand"] = torch.tensor(float(trainer.current_epoch))

    pruning = AutoPruneCallback(target_sparsity=0.7)
    fit([MetricSetter(), pruning, EarlyStopping("by_hand", patience=99)], val=loader(seed=3))
    assert [value for _, _, value in pruning._run.report.history.points] == [0, 1, 2, 3]


def test_the_first_monitored_metric_that_is_logged_is_followed():
    callbacks = [EarlyStopping("nope", strict=False, patience=99), ModelCheckpoint("c", monitor="val_loss")]
    points, pruning = fit_and_get_points(callbacks, val=loader(seed=3))
    assert [(step, value) for step, _, value in points] == read_logged("val_loss")
    history = pruning._run.report.history
    t = trainer(callbacks=callbacks, enable_checkpointing=True)
    assert best_values(t, history).keys() == {"best_val_loss", "best_pruned_val_loss"}


@pytest.mark.parametrize("name", ["train_accuracy_epoch", "val_loss"])
def test_a_resumed_run_has_the_same_points_as_an_uninterrupted_one(name):
    def run(**options):
        other = {"train_accuracy_epoch": "val_loss", "val_loss": "train_accuracy_epoch"}[name]
        stops = [EarlyStopping(metric, strict=False, patience=99) for metric in (name, other)]
        options = {"val": loader(seed=3), "val_check_interval": 0.5, **options}
        return fit_and_get_points([*stops, saving("c", save_on_train_epoch_end=True)], **options)

    uninterrupted, pruning = run()
    resumed, resumed_pruning = run(ckpt_path="c/step=16.ckpt")
    assert resumed == uninterrupted
    assert resumed_pruning._run.report.history.masks_final_at == pruning._run.report.history.masks_final_at


def test_the_best_pruned_value_is_the_best_one_with_final_masks():
    history = RunHistory()
    for step, sparsity, value in [(1, 0.0, 0.1), (2, 0.6, 0.2), (3, 0.5, 0.3), (4, 0.5, 0.5), (5, 0.5, 0.4)]:
        history.record_metric("val_loss", step, sparsity, value, masks_final=step >= 4)
    t = trainer(callbacks=[EarlyStopping("val_loss")])
    assert best_values(t, history) == {"best_val_loss": 0.1, "best_pruned_val_loss": 0.4}


def test_there_is_no_best_pruned_value_if_masks_never_become_final():
    stop = EarlyStopping("val_loss", stopping_threshold=99)
    _, pruning = fit_and_get_points([stop], val=loader(seed=3))
    assert not pruning._run.pruner.masks_final
    assert best_values(trainer(callbacks=[stop]), pruning._run.report.history).keys() == {"best_val_loss"}
