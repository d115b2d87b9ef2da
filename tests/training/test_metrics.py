"""The metrics that are logged, read back from the files of real loggers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Net, csv_logger, fit, loader, rows, trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from paths import SUPPORT
from torch import nn
from wandb_file import read_history

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.plots import read_curves
from lightning_autoprune.training.metrics import MetricsReporter

SCALARS = {
    "autoprune/sparsity",
    "autoprune/density",
    "autoprune/compression",
    "autoprune/pressure",
    "autoprune/held_out_loss",
}
COUNTS = {"autoprune/pruned", "autoprune/revived"}
LAYERS = {"autoprune/layer_sparsity/first", "autoprune/layer_sparsity/last"}


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
        assert {name: row[f"autoprune/layer_sparsity/{name}"] for name in layers} == pytest.approx(layers, abs=1e-6)
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
    last = {name: history[-1][f"autoprune/layer_sparsity/{name}"] for name in ("first", "last")}
    assert last == pytest.approx(callback.layer_sparsity())


def test_tensorboard_gets_every_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS | COUNTS | LAYERS
    first = events.Scalars("autoprune/layer_sparsity/first")[-1].value
    assert first == pytest.approx(callback.layer_sparsity()["first"])


def test_several_loggers_get_the_same_values():
    fit(AutoPruneCallback(), logger=[csv_logger(Path("a")), csv_logger(Path("b"))])
    assert rows("a") == rows("b") != []


class Recorder(Logger):
    """A logger of the user's own, with exactly the signatures of Lightning's base class."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics, self.hyperparameters = [], []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))
        metrics.clear()  # what it does with its argument is its own affair

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters.append(params)


class KeywordRecorder(Recorder):
    """It takes the metrics by keyword only, as Lightning gives them."""

    def log_metrics(self, *, step=None, metrics):
        super().log_metrics(metrics, step)


def named_model(*names: str) -> Net:
    """Return a model with further layers of such names, which a path of files or a logger may not take."""
    model = Net()
    model.heads = nn.ModuleDict({name: nn.Linear(12, 4) for name in names})
    model.forward = lambda x: Net.forward(model, x) + sum(head(x) for head in model.heads.values())
    return model


@pytest.mark.parametrize("kind", [Recorder, KeywordRecorder])
def test_a_logger_of_the_users_own_is_called_as_lightning_calls_it(kind):
    loggers = [kind(), kind()]
    callback = AutoPruneCallback(target_sparsity=0.8)
    _, t = fit(callback, logger=loggers)
    a, b = ([(step, row) for step, row in logger.metrics if "autoprune/sparsity" in row] for logger in loggers)
    assert a == b
    assert a[-1][1].keys() >= COUNTS | LAYERS
    assert all(type(value) is float for _, row in a for value in row.values())
    assert float(t.callback_metrics["autoprune/sparsity"]) == callback.sparsity


@pytest.mark.parametrize("heads", [("a", "a/b", "a_b"), ("C", "C++", "C#"), ("x" * 240, "y" + "x" * 239), ("größe",)])
def test_no_metric_is_a_folder_of_another_whatever_the_layers_are_called(heads):
    logger = Recorder()
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, model=named_model(*heads), logger=logger)
    names = {name for _, row in logger.metrics for name in row if name.startswith("autoprune/")}
    assert not [(a, b) for a in names for b in names if b.startswith(f"{a}/")]
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]{1,240}", name) for name in names)
    layers = [name for name in names if name.startswith("autoprune/layer_sparsity/")]
    assert len(layers) == len(callback.layer_sparsity()) == 2 + len(heads)


def test_layer_curves_can_be_left_out_of_the_loggers():
    logger, callback = Recorder(), AutoPruneCallback(target_sparsity=0.8, log_layers=False)
    fit(callback, logger=[logger, csv_logger(Path("logs"))])
    names = {name for _, row in logger.metrics for name in row if name.startswith("autoprune/")}
    assert names == SCALARS | COUNTS
    assert callback.curves.keys() == {"first", "last", "all"}
    assert read_curves("logs/metrics.csv").keys() == {"all"}


def test_a_model_of_very_many_layers_is_logged_in_several_calls():
    """MLflow takes at most 1000 metrics at a time."""
    metrics, layers = {"autoprune/sparsity": 0.5}, {f"layers.{i}": i / 2000 for i in range(2000)}
    logger = Recorder()
    MetricsReporter(list(layers)).log(trainer(logger=logger), metrics, layers, [])
    assert all(len(row) <= 1000 for _, row in logger.metrics)
    logged = {name: value for _, row in logger.metrics for name, value in row.items()}
    assert {name: logged[f"autoprune/layer_sparsity/{name}"] for name in layers} == layers
    assert logged.keys() >= {"autoprune/sparsity", *COUNTS}


def test_model_checkpoint_and_early_stopping_can_monitor_sparsity():
    checkpoint = ModelCheckpoint(
        dirpath="best", monitor="autoprune/sparsity", mode="max", every_n_train_steps=1, filename="{step}"
    )
    stop = EarlyStopping("autoprune/sparsity", mode="max", stopping_threshold=0.4, check_on_train_epoch_end=True)
    callback = AutoPruneCallback(target_sparsity=0.8)
    _, t = fit([callback, checkpoint, stop], enable_checkpointing=True, epochs=10)
    assert 0.4 < callback.sparsity < 0.95
    assert t.current_epoch < 9
    assert checkpoint.best_model_score == pytest.approx(callback.sparsity, abs=0.1)


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
