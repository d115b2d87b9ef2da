"""16-bit floats with a scaler, whose gradients overflow now and then; bfloat16 is in the checkpoint tests."""

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
    """An optimizer that takes the scale out of the gradients itself."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, fused=True)


class Steps(Callback):
    """Weights and M, before and after each step."""

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
def test_it_prunes_to_the_target_while_steps_are_skipped(model, held_out):
    torch.manual_seed(2)
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    steps = Steps(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network, _ = fit([callback, steps], model(), epochs=8, plugins=half(2.0**20))
    assert sparsity(network) == pytest.approx(0.8, abs=0.005)
    assert len(set(steps.scales)) > 3  # it went up and down
    assert not any("auxiliary step" in str(w.message) for w in caught)
    assert sum(steps.m_moved) > 10


def test_the_scale_has_no_say_in_the_masks():
    """Up to the rounding of the gradients, which 16 bits do at every scale."""

    def masks(scale):
        torch.manual_seed(0)
        callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.5, train_gradients=True)
        seen = []

        class Seen(Callback):
            def on_train_batch_end(self, *_):
                seen.append([mask.clone() for mask in callback._run.pruner.masks()])

        fit([callback, Seen()], Fused(), epochs=4, plugins=half(scale, 10**6))
        return [torch.cat([mask.flatten() for mask in some]).float() for some in seen if some]

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


def test_a_held_out_loss_that_is_never_finite_is_an_error_with_a_scaler_too():
    def nan(module, batch):
        return module(batch[0]).sum() * float("nan")

    with pytest.raises(AutoPruneError, match="the held-out loss is nan, not finite, for the 10th time in a row"):
        fit(AutoPruneCallback(loss_fn=nan), epochs=8, plugins=half())


def test_a_training_loss_that_is_never_finite_is_an_error_with_a_scaler_too():
    class Bad(Net):
        def training_step(self, batch):
            return super().training_step(batch) * float("nan")

    with pytest.raises(AutoPruneError, match="the gradient for the auxiliary step is not finite, for the 10th time"):
        fit(AutoPruneCallback(target_sparsity=0.8, held_out="train"), Bad(), epochs=20, plugins=half())


def test_a_step_without_a_loss_at_the_end_of_an_accumulation_leaves_no_scale_in_the_gradients():
    def largest(scale):
        class Skips(Net):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch)
                return None if batch_idx % 4 == 3 else loss

        torch.manual_seed(0)
        callback = AutoPruneCallback(target_sparsity=0.8, held_out="train")
        found = []

        class Look(Callback):
            def on_train_batch_end(self, *_):
                auxiliary = callback._run.pruner.auxiliary
                found.append(auxiliary.scale.mean_square if auxiliary else 0.0)

        options = {"epochs": 8, "accumulate_grad_batches": 2}
        fit([callback, Look()], Skips(), plugins=half(scale, 10**6), **options)
        return max(found)

    assert largest(2.0**12) == pytest.approx(largest(2.0**6), rel=0.5)
