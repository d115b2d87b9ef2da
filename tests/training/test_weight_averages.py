"""Averages of the weights that other callbacks maintain are pruned like the model."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, Resumable, fit, loader, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

from lightning_autoprune import AutoPruneCallback, sparsity
from lightning_autoprune.training.weight_averages import zero_pruned_weights

AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "mean": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=0.5),
}


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_is_pruned_to_the_target(tmp_path, kind, pruning_first):
    class SparsityRecorder(Callback):
        def on_train_epoch_end(self, *_):
            self.sparsity = sparsity(average._average_model)

    callback, average, recorder = AutoPruneCallback(target_sparsity=0.8), AVERAGES[kind](), SparsityRecorder()
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", save_last=True)
    order = [callback, average, recorder, checkpoint] if pruning_first else [average, callback, recorder, checkpoint]
    model, _ = fit(order, epochs=8, val=loader(32), enable_checkpointing=True)
    assert sparsity(model) == pytest.approx(0.8, abs=0.005)
    assert recorder.sparsity == pytest.approx(0.8, abs=0.005)
    if kind != "swa":  # SWA saves the trained weights, and their average separately
        state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        other = Net()
        other.load_state_dict(state)
        assert sparsity(other) == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("kind", ["ema", "mean"])
def test_the_model_ends_with_the_average_instead_of_the_last_weights(kind):
    class WeightRecorder(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weight = pl_module.first.weight.detach().clone()

    recorder = WeightRecorder()
    model, _ = fit([AutoPruneCallback(target_sparsity=0.8), AVERAGES[kind](), recorder], epochs=8)
    kept = model.first.weight != 0
    assert not same(model.first.weight[kept], recorder.weight[kept])


@pytest.mark.parametrize("epoch", [2, 6])  # during pruning, and with final masks
def test_resuming_with_an_average_is_bit_exact(tmp_path, epoch):
    def run(ckpt_path=None):
        callbacks = [
            AutoPruneCallback(target_sparsity=0.8),
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(tmp_path / str(ckpt_path is None), "{epoch}", save_top_k=-1),
        ]
        model, _ = fit(callbacks, train=Resumable(), epochs=8, enable_checkpointing=True, ckpt_path=ckpt_path)
        return dict(model.state_dict())

    assert same(run(), run(tmp_path / "True" / f"epoch={epoch}.ckpt"))


def test_the_average_of_a_run_that_ends_early_is_pruned_like_the_model():
    class EarlyStop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 4

    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit([callback, EMAWeightAveraging(decay=0.9), EarlyStop()], epochs=8)
    assert callback.sparsity > 0.5
    assert sparsity(model) == callback.sparsity


def test_the_epoch_that_swa_adds_for_batchnorm_does_not_count_as_training():
    callback = AutoPruneCallback(target_sparsity=0.8, finetune=0.1)
    fit([callback, StochasticWeightAveraging(0.01, swa_epoch_start=0.5)], epochs=6)
    assert callback._run.pruner.phases.total == 6 * 8
    assert callback._run.pruner.masks_final


def test_an_average_is_pruned_after_resuming_with_final_masks(tmp_path):
    def callbacks(folder):
        return [
            AutoPruneCallback(target_sparsity=0.8),
            EMAWeightAveraging(decay=0.9),
            ModelCheckpoint(tmp_path / folder, "{epoch}", save_top_k=-1),
        ]

    options = {"train": Resumable(), "enable_checkpointing": True}
    fit(callbacks("long"), epochs=8, **options)
    shorter = callbacks("short")
    fit(shorter, epochs=6, ckpt_path=tmp_path / "long" / "epoch=4.ckpt", **options)
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "short" / "epoch=5.ckpt", weights_only=True)["state_dict"])
    assert sparsity(other) == pytest.approx(0.8, abs=0.005)


def test_zero_pruned_weights_applies_the_mask():
    weight, mask = torch.ones(3), torch.tensor([True, False, True])
    zero_pruned_weights(weight, mask)
    assert weight.tolist() == [1, 0, 1]
