"""The callback's settings, read back from the files of real loggers: a run says how it was pruned."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import Net, fit, held_out_loss, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import nn
from wandb_file import read_records

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.training.callback_settings import CallbackSettings

ABOUT_LOGS = {"log_every_n_steps", "log_layers", "figures_every_n_epochs", "log_artifact", "enabled"}


class WithHyperparameters(Net):
    """A module that saves hyperparameters; one of them has the name of the package."""

    def __init__(self, width: int = 16, autoprune: str = "mine") -> None:
        super().__init__(hidden=width)
        self.save_hyperparameters()


OWN = {"width": 16, "autoprune": "mine"}


def prune(logger, model=None, trainer_options=None, **settings) -> None:
    callback = AutoPruneCallback(**{"target_sparsity": 0.8, "figures_every_n_epochs": None, **settings})
    fit(callback, model=model or WithHyperparameters(), logger=logger, epochs=2, **(trainer_options or {}))


def ours(values: dict) -> dict:
    """Return the settings among the hyperparameters of a run, by name."""
    root = "autoprune_callback/"
    return {name.removeprefix(root): value for name, value in values.items() if name.startswith(root)}


def own(values: dict) -> dict:
    """Return the hyperparameters of a run that are not the callback's settings."""
    return {name: value for name, value in values.items() if not name.startswith("autoprune_callback/")}


def expected(held_out=0.25) -> dict:
    """Return the settings that are logged; what is held out by default is known once the first batch has been seen."""
    settings = CallbackSettings(target_sparsity=0.8)
    names = {entry.name for entry in fields(CallbackSettings)} - ABOUT_LOGS
    return {name: getattr(settings, name) for name in names} | {"held_out": held_out}


def wandb_config(folder: Path) -> dict:
    config = {}
    for record in read_records(folder):
        if record.WhichOneof("record_type") in ("config", "run"):
            update = record.config if record.HasField("config") else record.run.config
            config |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update.update}
    config.pop("_wandb", None)
    return config


def test_the_config_of_a_real_offline_wandb_run_has_the_settings_and_the_modules_own(tmp_path):
    import wandb

    prune(WandbLogger(project="test", save_dir=str(tmp_path)))
    wandb.finish()
    config = wandb_config(tmp_path)
    assert ours(config) == expected()
    assert own(config) == OWN


def test_the_hyperparameters_of_a_csv_logger_have_both(tmp_path):
    prune(CSVLogger(str(tmp_path), name="", version=""))
    values = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (ours(values), own(values)) == (expected(), OWN)


def tensorboard_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"tensors": 0}).Reload()


def tensorboard_hyperparameters(folder) -> dict:
    """Return what the tab HPARAMS shows: the first hyperparameters of the run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = tensorboard_events(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return {*HParamsPluginData.FromString(content).session_start_info.hparams}


def test_tensorboard_has_both_in_its_file_and_the_settings_as_a_text(tmp_path):
    prune(TensorBoardLogger(str(tmp_path), name="", version=""))
    values = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (ours(values), own(values)) == (expected(held_out=None), OWN)
    events = tensorboard_events(tmp_path)
    text = events.Tensors("autoprune/settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[:3] == ["| setting | value |", "| --- | --- |", "| `target_sparsity` | `0.8` |"]
    assert len(text.splitlines()) == 2 + len(expected())
    assert tensorboard_hyperparameters(tmp_path) == {"width", "autoprune"}
    assert [event.value for event in events.Scalars("hp_metric")] == [-1]


def test_tensorboards_file_has_the_settings_if_a_validation_comes_before_the_fit(tmp_path):
    callback, logger = AutoPruneCallback(target_sparsity=0.8), TensorBoardLogger(str(tmp_path), name="", version="")
    model, validating = WithHyperparameters(), trainer(epochs=2, callbacks=[callback], logger=logger)
    validating.validate(model, loader(seed=3), verbose=False)
    validating.fit(model, loader())
    values = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert (ours(values), own(values)) == (expected(held_out=None), OWN)


def test_hyperparameters_that_a_module_logs_itself_with_its_metrics_are_those_that_tensorboard_shows(tmp_path):
    class LogsItself(Net):
        def on_train_start(self):
            self.logger.log_hyperparams({"width": 16}, {"val_loss": 0.5})

    prune(TensorBoardLogger(str(tmp_path), name="", version="", default_hp_metric=False), model=LogsItself())
    assert tensorboard_hyperparameters(tmp_path) == {"width"}
    assert tensorboard_events(tmp_path).Scalars("val_loss")[0].value == 0.5


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch):
    """Return a client of MLflow's file store, and the place of the store."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setitem(os.environ, "MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path / 'mlruns'}"
    return mlflow.MlflowClient(uri), uri


def test_mlflow_gets_every_curve_and_the_settings(mlflow_client):
    client, uri = mlflow_client
    model = WithHyperparameters()
    model.heads = nn.ModuleDict({name: nn.Linear(12, 4) for name in ("a", "a/b", "C", "C++", "z" * 240)})
    model.forward = lambda x: Net.forward(model, x) + sum(head(x) for head in model.heads.values())
    logger = MLFlowLogger("test", tracking_uri=uri)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*MLFlow only allows.*|.*were not logged")
        prune(logger, model=model)
    run = client.get_run(logger.run_id).data
    assert ours(run.params) == {name: str(value) for name, value in expected().items()}
    assert own(run.params) == {name: str(value) for name, value in OWN.items()}
    layers = {name for name in run.metrics if name.startswith("autoprune/layer_sparsity/")}
    assert layers >= {f"autoprune/layer_sparsity/{name}" for name in ("first", "last", "heads.a", "heads.a_b")}
    assert len(layers) == 7
    assert run.metrics["autoprune/sparsity"] == pytest.approx(0.8, abs=0.01)


def test_an_mlflow_run_that_goes_on_with_other_settings_keeps_the_first_and_warns(mlflow_client):
    client, uri = mlflow_client
    logger = MLFlowLogger("test", tracking_uri=uri)
    prune(logger)
    prune(MLFlowLogger("test", tracking_uri=uri, run_id=logger.run_id))
    with pytest.warns(UserWarning, match=r"were not logged by MLFlowLogger, and training goes on: .*target_sparsity"):
        prune(MLFlowLogger("test", tracking_uri=uri, run_id=logger.run_id), target_sparsity=0.9)
    run = client.get_run(logger.run_id).data
    assert ours(run.params) == {name: str(value) for name, value in expected().items()}
    assert run.metrics["autoprune/sparsity"] == pytest.approx(0.9, abs=0.01)


class LastOnly(Logger):
    """A logger of the user's own that keeps only the hyperparameters that it gets last."""

    name, version = "last", 0

    def __init__(self) -> None:
        super().__init__()
        self.params = None

    def log_metrics(self, metrics, step=None):
        """Drop them."""

    def log_hyperparams(self, params, *args, **kwargs):
        self.params = dict(params)


def test_a_logger_that_replaces_hyperparameters_keeps_those_of_the_module():
    logger = LastOnly()
    prune(logger)
    assert (ours(logger.params), own(logger.params)) == (expected(), OWN)


def test_functions_loaders_and_patterns_have_readable_names():
    logger = LastOnly()
    prune(
        logger,
        held_out=loader(),
        loss_fn=held_out_loss,
        schedule=lambda progress, first, last: first + (last - first) * progress,
        include=["first", "la*"],
    )
    values = ours(logger.params)
    assert values["held_out"] == "torch.utils.data.dataloader.DataLoader"
    assert values["loss_fn"] == "helpers.held_out_loss"
    assert values["schedule"].endswith("<lambda>")
    assert values["include"] == ["first", "la*"]


@pytest.mark.parametrize(
    ("settings", "trainer_options"),
    [
        ({"enabled": False}, {}),
        ({"warmup": 1.0, "finetune": 0.0}, {}),
        ({}, {"enable_autolog_hparams": False}),
    ],
    ids=["disabled", "only dense", "no hyperparameters wanted"],
)
def test_no_settings_are_logged(settings, trainer_options):
    logger = LastOnly()
    prune(logger, model=Net(), trainer_options=trainer_options, **settings)
    assert logger.params is None


def test_a_logger_that_refuses_the_settings_does_not_stop_the_training():
    class Refusing(LastOnly):
        def log_hyperparams(self, params, *args, **kwargs):
            if ours(params):
                raise ConnectionError("the server is gone")
            super().log_hyperparams(params)

    refusing, other = Refusing(), LastOnly()
    with pytest.warns(UserWarning, match=r"not logged by Refusing, and training goes on: ConnectionError: the server"):
        prune([refusing, other])
    assert refusing.params == OWN
    assert ours(other.params) == expected()


def test_a_trial_run_of_the_trainer_logs_nowhere():
    seen = []

    class LoggerRecorder(Callback):
        def on_train_start(self, trainer, *_):
            seen.extend(trainer.loggers)

    callback = AutoPruneCallback(target_sparsity=0.8)
    logger = LastOnly()
    fit([callback, LoggerRecorder()], logger=logger, fast_dev_run=3)
    assert [type(found).__name__ for found in seen] == ["DummyLogger"]
    assert logger.params is None
