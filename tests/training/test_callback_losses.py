"""Unusable held-out losses: training continues after one, and stops after ten in a row.

The first call of a `loss_fn` is the trial before training, at step 0.
"""

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
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=BadLoss(lambda call: call == 4))
    with pytest.warns(UserWarning, match="At training step 5 the held-out loss is nan, not finite: no auxiliary step"):
        fit(callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_ten_bad_held_out_losses_in_a_row_stop_training():
    callback = AutoPruneCallback(warmup=0.1, loss_fn=BadLoss(lambda call: call > 3))
    with pytest.raises(AutoPruneError, match="step 14 the held-out loss is nan, not finite, for the 10th time"):
        fit(callback)


def test_a_good_loss_resets_the_count_of_bad_ones():
    callback = AutoPruneCallback(loss_fn=BadLoss(lambda call: call % 10 != 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, epochs=8)


class NoLossNet(Net):
    """Gives no loss in a held-out pass, which replaces `log`, once the trial is over."""

    gives_one_at_first = False

    def training_step(self, batch):
        is_held_out = "log" in vars(self) and not (self.gives_one_at_first and self.global_step == 0)
        return None if is_held_out else super().training_step(batch)


def test_a_training_step_that_returns_no_loss_is_refused_before_training_or_falls_back():
    message = "`training_step` of NoLossNet gives a loss for a whole batch that is None, not a tensor"
    with pytest.raises(AutoPruneError, match=message):
        fit(AutoPruneCallback(held_out=0.25), model=NoLossNet())
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match=message):
        fit(callback, model=NoLossNet())
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_the_error_says_that_training_step_returns_no_loss():
    model = NoLossNet()
    model.gives_one_at_first = True
    with pytest.raises(AutoPruneError, match="the held-out loss is None, not a tensor, for the 10th time"):
        fit(AutoPruneCallback(), model=model)
