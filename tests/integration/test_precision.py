"""16-bit floats with a gradient scaler, where gradients sometimes overflow; bfloat16 is in ``test_resume``."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import Net, Resumable, fit, same
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.amp import GradScaler

from lightning_autoprune import AutoPruneCallback, AutoPruneError, sparsity


class Fused(Net):
    """Has an optimizer that unscales the gradients itself."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, fused=True)


class StepWatch(Callback):
    """Notes for each step whether it moved the weights and M, and the scale after it."""

    def __init__(self, callback):
        self.callback, self.moved, self.m_moved, self.scales = callback, [], [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = pl_module.first.weight.detach().clone()
        auxiliary = self.callback._run.pruner.auxiliary
        self.m = auxiliary.M[0].clone() if auxiliary and auxiliary.M else None

    def on_train_batch_end(self, trainer, pl_module, *_):
        auxiliary = self.callback._run.pruner.auxiliary
        if self.m is not None and auxiliary.M:
            self.moved.append(not same(self.before, pl_module.first.weight.detach()))
            self.m_moved.append(not same(self.m, auxiliary.M[0]))
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def half(scale=2.0**16, interval=5):
    scaler = GradScaler("cpu", init_scale=scale, growth_interval=interval)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("model", [Net, Fused])
@pytest.mark.parametrize("held_out", [0.25, "train"])
def test_the_target_is_met_although_the_scaler_skips_steps(model, held_out):
    torch.manual_seed(2)
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    steps = StepWatch(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network, _ = fit([callback, steps], model(), epochs=8, plugins=half(2.0**20))
    assert sparsity(network) == pytest.approx(0.8, abs=0.005)
    assert len(set(steps.scales)) > 3  # the scale grew and shrank
    assert not any("auxiliary step" in str(w.message) for w in caught)
    assert sum(steps.m_moved) > 10


def test_the_loss_scale_does_not_change_the_masks():
    """Except for rounding: 16-bit gradients are rounded at every scale."""

    def masks(scale):
        torch.manual_seed(0)
        callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.5, train_gradients=True)
        steps = []

        class Recorder(Callback):
            def on_train_batch_end(self, *_):
                steps.append([mask.clone() for mask in callback._run.pruner.masks()])

        fit([callback, Recorder()], Fused(), epochs=4, plugins=half(scale, 10**6))
        return [torch.cat([mask.flatten() for mask in step]).float() for step in steps if step]

    one, two = masks(2.0**6), masks(2.0**12)
    assert len(one) > 10
    assert sum(float((a - b).abs().mean()) for a, b in zip(one, two, strict=True)) / len(one) < 0.02


def test_a_run_in_16_bits_resumes_bit_equal(tmp_path):
    def run(ckpt_path=None):
        save = ModelCheckpoint(tmp_path / str(ckpt_path is None), "{epoch}", save_top_k=-1)
        callback = AutoPruneCallback(target_sparsity=0.8)
        options = {"train": Resumable(), "epochs": 6, "enable_checkpointing": True, "ckpt_path": ckpt_path}
        model, _ = fit([callback, save], plugins=half(), **options)
        return dict(model.state_dict()), callback.state_dict()

    assert same(run(), run(tmp_path / "True" / "epoch=2.ckpt"))


def test_a_held_out_loss_that_is_never_finite_is_an_error_with_a_scaler():
    def nan(module, batch):
        return module(batch[0]).sum() * float("nan")

    with pytest.raises(AutoPruneError, match="the held-out loss is nan, not finite, for the 10th time in a row"):
        fit(AutoPruneCallback(loss_fn=nan), epochs=8, plugins=half())


def test_a_training_loss_that_is_never_finite_is_an_error_with_a_scaler():
    class NaNLoss(Net):
        def training_step(self, batch):
            return super().training_step(batch) * float("nan")

    with pytest.raises(AutoPruneError, match="the gradient for the auxiliary step is not finite, for the 10th time"):
        fit(AutoPruneCallback(target_sparsity=0.8, held_out="train"), NaNLoss(), epochs=20, plugins=half())


def test_gradients_are_unscaled_even_if_the_last_accumulated_step_has_no_loss():
    def largest_mean_square(scale):
        class Skips(Net):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch)
                return None if batch_idx % 4 == 3 else loss

        torch.manual_seed(0)
        callback = AutoPruneCallback(target_sparsity=0.8, held_out="train")
        mean_squares = []

        class Recorder(Callback):
            def on_train_batch_end(self, *_):
                auxiliary = callback._run.pruner.auxiliary
                mean_squares.append(auxiliary.scale.mean_square if auxiliary else 0.0)

        options = {"epochs": 8, "accumulate_grad_batches": 2}
        fit([callback, Recorder()], Skips(), plugins=half(scale, 10**6), **options)
        return max(mean_squares)

    assert largest_mean_square(2.0**12) == pytest.approx(largest_mean_square(2.0**6), rel=0.5)
