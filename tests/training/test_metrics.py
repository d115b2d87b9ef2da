"""The metrics that are logged, read back from the files of real loggers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import csv_logger, fit, loader, rows
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from paths import SUPPORT
from wandb_file import read_history

from lightning_autoprune import AutoPruneCallback

SCALARS = {
    "autoprune/sparsity",
    "autoprune/density",
    "autoprune/compression",
    "autoprune/pressure",
    "autoprune/held_out_loss",
}
COUNTS = {"autoprune/pruned", "autoprune/revived"}
LAYERS = {"autoprune/sparsity/first", "autoprune/sparsity/last"}


class WeightRecorder(Callback):
    """A callback that records the sparsity and the masks after each step, taken from the weights themselves."""

    def __init__(self) -> None:
        self.sparsity, self.masks = {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {"first": pl_module.first.weight, "last": pl_module.last.weight}
        self.sparsity[trainer.global_step] = {k: float((w == 0).float().mean()) for k, w in weights.items()}
        self.masks[trainer.global_step] = torch.cat([(w != 0).flatten() for w in weights.values()])


def test_correct_layer_curves_are_logged_at_the_trainers_interval():
    recorder = WeightRecorder()
    fit([AutoPruneCallback(target_sparsity=0.8, finetune=0.45), recorder], logger=csv_logger(Path("logs")))
    logged = rows("logs")
    final_step = 32 - round(0.45 * 32)
    assert [row["step"] for row in logged] == sorted({*range(1, 32, 2), final_step - 1})
    for row in logged:
        assert row.keys() - {"step", "epoch"} >= SCALARS - {"autoprune/held_out_loss"} | COUNTS | LAYERS
        layers = recorder.sparsity[row["step"] + 1]
        assert {name: row[f"autoprune/sparsity/{name}"] for name in layers} == pytest.approx(layers, abs=1e-6)
        expected = (192 * layers["first"] + 64 * layers["last"]) / 256
        assert row["autoprune/sparsity"] == pytest.approx(expected, abs=1e-6)
        assert row["autoprune/density"] == pytest.approx(1 - expected, abs=1e-6)
        assert row["autoprune/compression"] == pytest.approx(1 / (1 - expected), rel=1e-5)
    assert logged[0]["autoprune/sparsity"] == 0
    assert logged[-1]["autoprune/sparsity"] == pytest.approx(0.8, abs=0.01)


def test_pruned_and_revived_weights_are_counted_between_logs():
    recorder = WeightRecorder()
    fit([AutoPruneCallback(target_sparsity=0.8), recorder], logger=csv_logger(Path("logs")), epochs=12)
    before = torch.ones(256, dtype=torch.bool)
    revived = 0
    for row in rows("logs"):
        now = recorder.masks[row["step"] + 1]
        assert row["autoprune/pruned"] == (before & ~now).sum()
        assert row["autoprune/revived"] == (now & ~before).sum()
        revived += row["autoprune/revived"]
        before = now
    assert revived > 0


def test_weights_pruned_before_the_first_log_are_counted_too():
    callback = AutoPruneCallback(target_sparsity=0.8, log_every_n_steps=100, warmup=0.0)
    fit(callback, logger=csv_logger(Path("logs")))
    (row,) = rows("logs")
    assert row["autoprune/pruned"] == round(256 * callback.sparsity)


def test_the_logging_interval_can_be_set():
    fit(AutoPruneCallback(log_every_n_steps=10, finetune=0.0), logger=csv_logger(Path("logs")))
    assert [row["step"] for row in rows("logs")] == [9, 19, 29, 31]


def test_a_real_offline_wandb_run_has_every_curve(tmp_path):
    import wandb

    logger = WandbLogger(project="test", save_dir=str(tmp_path))
    callback = AutoPruneCallback(target_sparsity=0.8, finetune=0.45)
    fit(callback, logger=logger)
    wandb.finish()
    history = [row for row in read_history(tmp_path) if "autoprune/sparsity" in row]
    assert len(history) == 16  # every 2nd of 32 steps; masks become final at one of them
    assert history[-1].keys() >= (SCALARS - {"autoprune/held_out_loss"}) | COUNTS | LAYERS | {"trainer/global_step"}
    assert any("autoprune/held_out_loss" in row for row in history)
    last = {name: history[-1][f"autoprune/sparsity/{name}"] for name in ("first", "last")}
    assert last == pytest.approx(callback.layer_sparsity())


def test_tensorboard_gets_every_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS | COUNTS | LAYERS
    assert events.Scalars("autoprune/sparsity/first")[-1].value == pytest.approx(callback.layer_sparsity()["first"])


def test_several_loggers_get_the_same_values():
    fit(AutoPruneCallback(), logger=[csv_logger(Path("a")), csv_logger(Path("b"))])
    assert rows("a") == rows("b") != []


def test_model_checkpoint_and_early_stopping_can_monitor_sparsity():
    checkpoint = ModelCheckpoint(
        dirpath="best", monitor="autoprune/sparsity", mode="max", every_n_train_steps=1, filename="{step}"
    )
    stop = EarlyStopping("autoprune/sparsity", mode="max", stopping_threshold=0.4, check_on_train_epoch_end=True)
    callback = AutoPruneCallback(target_sparsity=0.8)
    _, t = fit([callback, checkpoint, stop], enable_checkpointing=True, epochs=10)
    assert 0.4 < callback.sparsity < 0.95
    assert t.current_epoch < 9
    assert checkpoint.best_model_score == pytest.approx(callback.sparsity, abs=0.05)


def test_the_progress_bar_shows_the_sparsity():
    seen = []

    class ProgressBarRecorder(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(trainer.progress_bar_metrics["sparsity"])

    fit([AutoPruneCallback(target_sparsity=0.8), ProgressBarRecorder()])
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    "options", [{"logger": False}, {"val": loader(seed=3), "logger": False}], ids=["plain", "validated"]
)
def test_metrics_can_be_monitored_without_a_logger(options):
    callback = AutoPruneCallback(target_sparsity=0.8)
    _, t = fit(callback, **options)
    assert float(t.callback_metrics["autoprune/sparsity"]) == pytest.approx(0.8, abs=0.01)


def test_the_package_works_without_wandb_and_scikit_learn():
    code = """
import sys
for name in ("wandb", "sklearn"):
    sys.modules[name] = None  # as if it were not installed
import lightning_autoprune
from helpers import fit, csv_logger
from pathlib import Path
callback = lightning_autoprune.AutoPruneCallback(target_sparsity=0.5)
fit(callback, logger=csv_logger(Path("logs")))
print(callback.sparsity)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SUPPORT)!r})\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("0.5")


def test_the_held_out_loss_is_not_logged_once_masks_are_final():
    seen = []

    class MetricRecorder(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append("autoprune/held_out_loss" in trainer.callback_metrics)

    stop = EarlyStopping("autoprune/held_out_loss", strict=False, patience=3)
    callback = AutoPruneCallback(target_sparsity=0.5, warmup=0.1, finetune=0.6)
    _, trainer = fit([callback, MetricRecorder(), stop], epochs=20, val=loader())
    assert trainer.current_epoch == 20
    assert seen == [False] * 2 + [True] * 6 + [False] * 12
