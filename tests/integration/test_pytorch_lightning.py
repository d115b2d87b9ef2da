"""The callback with ``pytorch_lightning``: beside ``lightning`` in one process, and in an environment without it."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers import CLASSES, FEATURES, data, flat, rows
from paths import ROOT
from torch import nn
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity
from lightning_autoprune.training.lightning_package import BaseCallback, ModelCheckpoint, both
from lightning_autoprune.training.strategies import support_for
from lightning_autoprune.training.trainer_checks import check_package

PACKAGES = [lightning.pytorch, pytorch_lightning]
WITHOUT_LIGHTNING = ["training/test_callback", "training/test_weight_averages", "integration/test_lightning_cli"]


def make_net(package: Any) -> Any:
    class Net(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, CLASSES))
            self.example_input_array = torch.zeros(2, FEATURES)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss, on_epoch=True)
            return loss

        def validation_step(self, batch):
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def on_train_batch_end(self, *_):
            """Override the hook, as a module of a user may."""

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.01)

    torch.manual_seed(0)
    return Net()


def fit(package: Any, folder: Path | str, callback: Any, **options: Any) -> Any:
    """Fit a module with the Trainer, the callbacks and the logger of a package."""
    package.seed_everything(1, verbose=False)
    callbacks = [
        callback,
        package.callbacks.ModelCheckpoint(str(folder), monitor="val_loss", save_top_k=1, filename="{step}"),
        package.callbacks.EMAWeightAveraging(decay=0.5),
        package.callbacks.GradientAccumulationScheduler({1: 2}),
    ]
    trainer = package.Trainer(
        max_epochs=5,
        accelerator="cpu",
        callbacks=callbacks,
        logger=package.loggers.CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=1),
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model := make_net(package), DataLoader(data(), 16, shuffle=True), DataLoader(data(64, 3), 16))
    return model


@pytest.mark.parametrize("settings", [{}, {"granularity": "neuron"}, {"held_out": "val"}, {"redraw_held_out": False}])
@pytest.mark.filterwarnings("ignore")
def test_both_packages_give_the_same_bits_and_logs_in_one_process(settings, tmp_path):
    one, two = (AutoPruneCallback(0.6, **settings) for _ in PACKAGES)
    models = [fit(p, tmp_path / p.__name__, c) for p, c in zip(PACKAGES, (one, two), strict=True)]
    assert torch.equal(*map(flat, models))
    assert one.curves == two.curves
    assert one.layers() == two.layers()
    assert one.sparsity == two.sparsity >= 0.59
    assert sparsity(models[1]) > 0.5
    logs = [rows(tmp_path / package.__name__) for package in PACKAGES]
    assert logs[0] == logs[1]
    assert one._run.report.history.metric == two._run.report.history.metric == "val_loss"
    assert all((tmp_path / package.__name__ / "autoprune_layers.csv").exists() for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_callback_alone_is_a_callback_of_either_package(package):
    assert isinstance(AutoPruneCallback(), package.Callback)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    package.Trainer(callbacks=AutoPruneCallback(), **options)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_refused_is_refused_in_either_package(package, tmp_path):
    callbacks = package.callbacks
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": str(tmp_path)}
    for other, message in (
        (callbacks.ModelPruning("l1_unstructured"), "also has Lightning's ModelPruning"),
        (callbacks.ModelCheckpoint(monitor="autoprune/held_out_loss"), "ModelCheckpoint monitors"),
    ):
        trainer = package.Trainer(callbacks=[AutoPruneCallback(), other], **options)
        with pytest.raises(AutoPruneError, match=message):
            trainer.fit(make_net(package), DataLoader(data(), 16))
    sharded: Any = SimpleNamespace(strategy=object.__new__(package.strategies.FSDPStrategy))
    with pytest.raises(AutoPruneError, match="does not work under FSDPStrategy yet"):
        support_for(sharded)


def test_a_trainer_of_another_package_is_named():
    trainer: Any = SimpleNamespace()
    with pytest.raises(AutoPruneError, match="The Trainer is of types, and AutoPruneCallback works with the"):
        check_package(trainer)


def test_classes_are_found_in_both_packages():
    assert both(ModelCheckpoint) == tuple(package.callbacks.ModelCheckpoint for package in PACKAGES)
    assert both(dict) == (dict,)
    assert BaseCallback.__mro__[1:3] == tuple(package.Callback for package in PACKAGES)


def test_only_one_module_imports_lightning():
    importing = set()
    for path in (ROOT / "lightning_autoprune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.partition(".")[0] for name in names} & {"lightning", "pytorch_lightning", "lightning_fabric"}:
                importing.add(path.name)
    assert importing == {"lightning_package.py"}


def test_tests_pass_in_an_environment_without_lightning(tmp_path):
    """Link all installed packages but ``lightning``, and run tests that import ``pytorch_lightning`` instead."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in {Path(importlib.import_module(name).__file__ or "").parents[1] for name in ("torch", "lightning")}:
        for entry in folder.iterdir():
            if entry.name != "lightning" and not entry.name.startswith(
                ("lightning-", "lightning_autoprune", "_editable")
            ):
                (packages / entry.name).symlink_to(entry)
    project = tmp_path / "project"
    shutil.copytree(ROOT / "tests", project / "tests")
    shutil.copytree(ROOT / "docs", project / "docs", ignore=shutil.ignore_patterns("_build"))
    for name in ("pyproject.toml", "lightning_autoprune", "benchmarks"):
        (project / name).symlink_to(ROOT / name)
    for path in [*project.glob("tests/**/*.py"), project / "docs" / "config.yaml"]:
        text = path.read_text().replace("lightning.pytorch", "pytorch_lightning")
        path.write_text(text.replace("lightning.fabric", "lightning_fabric"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": f"{project}{os.pathsep}{packages}", "OMP_NUM_THREADS": "1"}
    python = [sys.executable, "-S"]  # without the packages of this environment
    check = "import importlib.util as u, pytorch_lightning; assert u.find_spec('lightning') is None"
    subprocess.run([*python, "-c", check], env=environment, cwd=project, check=True)
    tests = [f"tests/{name}.py" for name in WITHOUT_LIGHTNING]
    command = [*python, "-m", "pytest", "-n", "0", "-W", "ignore", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=environment, cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
