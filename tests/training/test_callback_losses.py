"""Unusable held-out losses: training continues after one, and stops after ten in a row."""

from __future__ import annotations

import warnings

import pytest
from helpers import Net, fit, held_out_loss

from lightning_autoprune import AutoPruneCallback, AutoPruneError


class BadLoss:
    """A held-out loss that is NaN in chosen calls."""

    def __init__(self, is_bad) -> None:
        self.calls, self.is_bad = 0, is_bad

    def __call__(self, module, batch):
        self.calls += 1
        return held_out_loss(module, batch) * (float("nan") if self.is_bad(self.calls) else 1)


def test_one_bad_held_out_loss_is_warned_about_and_training_continues():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=BadLoss(lambda call: call == 3))
    with pytest.warns(UserWarning, match="At training step 5 the held-out loss is nan, not finite: no auxiliary step"):
        fit(callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_ten_bad_held_out_losses_in_a_row_stop_training():
    callback = AutoPruneCallback(warmup=0.1, loss_fn=BadLoss(lambda call: call > 2))
    with pytest.raises(AutoPruneError, match="step 14 the held-out loss is nan, not finite, for the 10th time"):
        fit(callback)


def test_a_good_loss_resets_the_count_of_bad_ones():
    callback = AutoPruneCallback(loss_fn=BadLoss(lambda call: call % 10 != 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, epochs=8)


def test_the_error_says_that_training_step_returns_no_loss():
    class NoLossNet(Net):
        def training_step(self, batch):
            return None if "log" in vars(self) else super().training_step(batch)  # the held-out pass replaces `log`

    with pytest.raises(AutoPruneError, match="the held-out loss is None, not a tensor, for the 10th time"):
        fit(AutoPruneCallback(), model=NoLossNet())
