"""Warnings about settings that differ between a checkpoint's run and the run that resumes it."""

from __future__ import annotations

import re

import pytest
from helpers import fit, saving

from lightning_autoprune import AutoPruneCallback


def test_new_settings_are_warned_about_if_masks_are_already_final():
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("done.ckpt")
    sparser = AutoPruneCallback(target_sparsity=0.95, pressure=1.0)
    message = (
        "The checkpoint's run had other settings: target_sparsity 0.8 (here 0.95), pressure 0.05 (here 1.0). Its masks"
        " are final, so they stay: to prune anew, start a new fit from its weights alone."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        fit(sparser, epochs=8, ckpt_path="done.ckpt")
    assert sparser.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_resumed_run_uses_new_settings_and_warns():
    fit([AutoPruneCallback(), saving(every_n_train_steps=20)], epochs=6, enable_checkpointing=True)
    message = (
        "other settings: pressure 0.05 (here 5.0), steps 48 (here 64). The run goes on with the new ones, as far as"
    )
    path = "checkpoints/step=20.ckpt"
    with pytest.warns(UserWarning, match=re.escape(message)):
        fit(strong := AutoPruneCallback(pressure=5.0), epochs=8, ckpt_path=path)
    fit(weak := AutoPruneCallback(), epochs=8, ckpt_path=path)
    assert strong.sparsity > weak.sparsity + 0.1


def test_unchanged_settings_are_not_warned_about(recwarn):
    _, t = fit(AutoPruneCallback(target_sparsity=0.8))
    t.save_checkpoint("done.ckpt")
    fit(AutoPruneCallback(target_sparsity=0.8), epochs=8, ckpt_path="done.ckpt")
    assert not [w for w in recwarn if "other settings" in str(w.message)]
