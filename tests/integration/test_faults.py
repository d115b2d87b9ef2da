"""Faults during a run: a killed process, a signal, a full disk, and losses and loggers that fail."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import Net, Resumable, fit, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from paths import ROOT, SUPPORT

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity

KILLS = int(os.environ.get("AUTOPRUNE_KILLS", "6"))  # 100 take a minute or two


def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bits(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    command = [sys.executable, str(SUPPORT / "kill_run.py"), str(tmp_path), str(KILLS), "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900 + 20 * KILLS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same bits" in done.stdout


class AtStep(Callback):
    """Calls a function after a number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def run(tmp_path, *others, ckpt_path=None, model=None, callback=None, **options):
    torch.manual_seed(0)
    callback = callback or AutoPruneCallback(target_sparsity=0.8)
    options = {"enable_checkpointing": True, **options}
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    model, trainer = fit(
        [callback, *others, save], model or Net(), Resumable(), epochs=6, ckpt_path=ckpt_path, **options
    )
    return dict(model.state_dict()), callback.state_dict(), trainer


def test_a_run_that_gets_sigterm_resumes_from_its_last_checkpoint(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        run(tmp_path, AtStep(25, lambda trainer: os.kill(os.getpid(), signal.SIGTERM)), plugins=LightningEnvironment())
    assert same(run(tmp_path, ckpt_path=tmp_path / "step=20.ckpt")[:2], whole[:2])


def test_a_full_disk_raises_the_original_error_and_leaves_the_last_checkpoint_intact(tmp_path):
    class Full(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            if trainer.global_step == 30:
                raise OSError(errno.ENOSPC, "No space left on device")
            super()._save_checkpoint(trainer, filepath)

    whole = run(tmp_path / "whole")
    callback = AutoPruneCallback(target_sparsity=0.8)
    save = Full(tmp_path / "full", "{step}", every_n_train_steps=10, save_top_k=-1)
    torch.manual_seed(0)
    model = Net()
    with pytest.raises(OSError, match="No space left on device"):
        fit([callback, save], model, Resumable(), epochs=6, enable_checkpointing=True)
    assert sparsity(model) == callback.sparsity > 0
    assert same(run(tmp_path, ckpt_path=tmp_path / "full" / "step=20.ckpt")[:2], whole[:2])


class NaNLoss(Net):
    """Has a NaN loss once: of the 20th training batch, or of the held-out batch after it."""

    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0

    def training_step(self, batch):
        loss = super().training_step(batch)
        held_out = len(batch[0]) == 4
        self.calls += not held_out
        bad = self.calls == 20 and (held_out if self.where == "held-out" else not held_out)
        return loss * float("nan") if bad else loss


def test_a_single_nan_held_out_loss_gives_a_warning_and_no_nan_weight(tmp_path):
    with pytest.warns(UserWarning, match="the held-out loss is nan, not finite: no auxiliary step is taken"):
        state, callback, _ = run(tmp_path, model=NaNLoss("held-out"))
    assert all(value.isfinite().all() for value in state.values())
    assert callback["pruner"]["auxiliary"]["frozen"]


def test_a_nan_training_loss_is_reported_and_fitting_stops(tmp_path):
    """The optimizer then makes every weight NaN, with the callback and without."""
    with (
        pytest.warns(UserWarning, match="not finite"),
        pytest.raises(AutoPruneError, match="for the 10th time in a row"),
    ):
        run(tmp_path, model=NaNLoss("training"))


def test_a_training_step_that_returns_none_skips_the_step(tmp_path):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch)
            return None if batch_idx == 3 and len(batch[0]) > 4 else loss

    state, _, trainer = run(tmp_path, model=Skips())
    zeros = sum(int((state[f"{name}.weight"] == 0).sum()) for name in ("first", "last"))
    assert zeros == round(0.8 * 256)
    assert trainer.callback_metrics["autoprune/sparsity"] == pytest.approx(0.8, abs=0.005)


def test_an_error_in_a_logger_reaches_the_user_and_the_run_is_released(tmp_path):
    class Broken(DummyLogger):
        def log_metrics(self, metrics, step=None):
            if step and step > 25:
                raise ConnectionError("the logger is gone")

    callback, model = AutoPruneCallback(target_sparsity=0.8), Net()
    with pytest.raises(ConnectionError, match="the logger is gone"):
        run(tmp_path, model=model, callback=callback, logger=Broken())
    assert sparsity(model) == callback.sparsity > 0
    assert not callback._run.is_training
    whole = run(tmp_path / "whole")
    assert same(run(tmp_path, ckpt_path=tmp_path / "step=20.ckpt")[:2], whole[:2])


def test_an_offline_wandb_run_ends_with_the_same_weights_as_one_without_a_logger(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    assert same(run(tmp_path / "a", logger=logger)[:2], run(tmp_path / "b")[:2])
    logger.experiment.finish()
