"""The contents of a checkpoint: true zeros under the plain model's keys, and a small pruning state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import BATCH, Net, data, fit, loader, same, saving

from lightning_autoprune import AutoPruneCallback, sparsity


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_true_zeros_and_loads_strictly_into_the_plain_model(weights_only):
    callback = AutoPruneCallback(target_sparsity=0.8)
    checkpoint = saving(save_weights_only=weights_only)
    model, _ = fit([callback, checkpoint], epochs=6, enable_checkpointing=True)
    saved = torch.load(checkpoint.best_model_path, weights_only=True)
    plain = Net()
    assert list(saved["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert sparsity(plain) == callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert not any(torch.signbit(value[value == 0]).any() for value in saved["state_dict"].values())
    x = data(seed=5)[:][0]
    assert torch.equal(plain.eval()(x), model.eval()(x))
    assert ("callbacks" in saved) == (not weights_only)


def test_load_from_checkpoint_restores_the_pruned_model():
    checkpoint = saving()
    model, _ = fit([AutoPruneCallback(target_sparsity=0.8), checkpoint], enable_checkpointing=True)
    loaded = Net.load_from_checkpoint(checkpoint.best_model_path)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))


def test_every_checkpoint_is_as_sparse_as_the_run_was_at_that_step():
    sparsities = {}

    class Watch(AutoPruneCallback):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            sparsities[trainer.global_step] = self.sparsity

    fit([Watch(target_sparsity=0.8), saving(every_n_train_steps=1)], enable_checkpointing=True)
    assert len(sparsities) == 32
    for path in Path("checkpoints").glob("*.ckpt"):
        plain = Net()
        plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert sparsity(plain) == sparsities[int(path.stem.split("=")[1])]


def test_a_checkpoint_saved_by_hand_after_fitting_has_the_final_masks():
    callback = AutoPruneCallback(target_sparsity=0.8)
    _, t = fit(callback)
    t.save_checkpoint("after.ckpt")
    state = torch.load("after.ckpt", weights_only=True)["callbacks"]["AutoPruneCallback"]
    assert state["pruner"]["auxiliary"]["frozen"]
    assert "M" not in state["pruner"]["auxiliary"]


def test_the_state_of_final_masks_takes_one_bit_per_weight():
    callback = AutoPruneCallback(target_sparsity=0.8)
    fit(callback, model=Net(hidden=256), train=loader(batch=BATCH))
    state = callback.state_dict()["pruner"]["auxiliary"]
    assert sum(mask.numel() for mask in state["masks"]) == 256 * 16 / 8
