"""Held-out losses that can't be used: one is survived, ten in a row are not."""

from __future__ import annotations

import warnings

import pytest
from helpers import Net, fit
from test_callback import cross_entropy

from lightning_autoprune import AutoPruneCallback, AutoPruneError


class BadLoss:
    """A held-out loss that is NaN in some calls."""

    def __init__(self, bad) -> None:
        self.calls, self.bad = 0, bad

    def __call__(self, module, batch):
        self.calls += 1
        return cross_entropy(module, batch) * (float("nan") if self.bad(self.calls) else 1)


def test_one_bad_held_out_loss_is_warned_about_and_training_goes_on():
    callback = AutoPruneCallback(target_sparsity=0.8, warmup=0.1, loss_fn=BadLoss(lambda call: call == 3))
    with pytest.warns(UserWarning, match="At training step 5 the held-out loss is nan, not finite: no auxiliary step"):
        fit(callback)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_ten_bad_held_out_losses_in_a_row_stop_training():
    callback = AutoPruneCallback(warmup=0.1, loss_fn=BadLoss(lambda call: call > 2))
    with pytest.raises(AutoPruneError, match="step 14 the held-out loss is nan, not finite, for the 10th time"):
        fit(callback)


def test_nine_bad_losses_a_good_one_and_nine_bad_ones_are_survived():
    callback = AutoPruneCallback(loss_fn=BadLoss(lambda call: call % 10 != 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(callback, epochs=8)


def test_a_training_step_without_a_loss_is_named():
    class Nothing(Net):
        def training_step(self, batch):
            return None if "log" in vars(self) else super().training_step(batch)  # None in the shield

    with pytest.raises(AutoPruneError, match="the held-out loss is None, not a tensor, for the 10th time"):
        fit(AutoPruneCallback(), model=Nothing())
