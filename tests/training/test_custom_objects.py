"""Custom estimators, update rules and schedules in a real run."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import Net, Resumable, fit, same, saving
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.method.update_rules import UpdateRule


class Momentum(UpdateRule):
    """The paper's rule with a running mean of g₀."""

    state_names = ("mean",)

    def sensitivity(self, dL_dT, W):
        return dL_dT * W.sign()

    def direction(self, g0, state, updates, decay):
        return state["mean"].lerp_(g0, 1 - decay) / (1 - decay**updates)


def bell(M: Tensor) -> Tensor:
    return torch.exp(-M.square())


def drop_early(progress: float, start: float, target: float) -> float:
    return start if progress < 0.3 else target


CUSTOM_OBJECTS = {"update_rule": Momentum(), "estimator": bell, "schedule": drop_early}


@pytest.mark.parametrize("setting", CUSTOM_OBJECTS)
def test_a_custom_object_changes_the_run_and_meets_the_target(setting):
    runs = {}
    for name, options in (("custom", {setting: CUSTOM_OBJECTS[setting]}), ("default", {})):
        callback = AutoPruneCallback(target_sparsity=0.8, auxiliary_lr=30_000, **options)  # the run is short
        model, _ = fit(callback)
        assert callback.sparsity == pytest.approx(0.8, abs=0.01)
        runs[name] = {key: value.clone() for key, value in model.state_dict().items()}
    assert not same(runs["custom"], runs["default"])


@pytest.mark.parametrize("step", [12, 20])
def test_resuming_with_custom_objects_is_bit_exact(step, recwarn):
    def run(**options):
        callback = AutoPruneCallback(target_sparsity=0.8, **CUSTOM_OBJECTS)
        checkpoint = saving(every_n_train_steps=1, save_on_train_epoch_end=False)
        return fit([callback, checkpoint], train=Resumable(), enable_checkpointing=True, **options)[0]

    uninterrupted = {key: value.clone() for key, value in run().state_dict().items()}
    resumed = run(ckpt_path=f"checkpoints/step={step}.ckpt")
    assert same(uninterrupted, dict(resumed.state_dict()))
    assert not [w for w in recwarn if "other settings" in str(w.message)]


def test_resuming_with_another_custom_rule_is_refused():
    class OtherRule(Momentum):
        state_names = ("slow",)

        def direction(self, g0, state, updates, decay):
            return state["slow"].lerp_(g0, 0.01)

    fit([AutoPruneCallback(update_rule=Momentum()), saving(every_n_train_steps=12)], enable_checkpointing=True)
    with pytest.raises(
        AutoPruneError, match=r"of another update rule than '.*OtherRule': resume with the same `update"
    ):
        fit(AutoPruneCallback(update_rule=OtherRule()), ckpt_path="checkpoints/step=12.ckpt")


def rule_with(**parts):
    """Return a rule in which some parts are replaced."""
    rule = type("Replaced", (Momentum,), {"__module__": "test_custom_objects"})()
    for name, part in parts.items():
        setattr(rule, name, part)
    return rule


INVALID = {
    "estimator of another shape": (
        {"estimator": lambda M: M[0]},
        "returned torch.float32 of shape (3,) for an M of shape",
    ),
    "estimator without a tensor": ({"estimator": lambda M: 1.0}, "returned float for an M of shape (2, 3); it must"),
    "estimator that writes": ({"estimator": lambda M: M.sigmoid_()}, "writes to M; it must return a new tensor"),
    "class of an estimator": ({"estimator": torch.nn.Sigmoid}, "could not be called with M: TypeError"),
    "complex estimator": ({"estimator": lambda M: M * 1j}, "returned torch.complex64 of shape (2, 3) for an M"),
    "no estimator": ({"estimator": 3}, "`estimator` is 3; allowed are 'linear', 'hard_sigmoid'"),
    "schedule of one argument": (
        {"schedule": lambda p: p},
        "could not be called with progress, first density and target",
    ),
    "class of a rule": ({"update_rule": Momentum}, "Momentum'>; allowed are 'adaptive', 'autoprune', 'vanilla', or an"),
    "state name without a tuple": (
        {"update_rule": rule_with(state_names=("mean"))},
        "test_custom_objects.Replaced is 'mean'; it must be a tuple of names",
    ),
    "sensitivity of another shape": (
        {"update_rule": rule_with(sensitivity=lambda g, W: g.sum())},
        "returned torch.float32 of shape () for entries of shape (6,); it must return finite floats in that shape",
    ),
    "sensitivity of integers": (
        {"update_rule": rule_with(sensitivity=lambda g, W: (g > 0).int())},
        "`sensitivity` of the `update_rule` test_custom_objects.Replaced returned torch.int32",
    ),
    "infinite sensitivity": ({"update_rule": rule_with(sensitivity=lambda g, W: g / 0)}, "must return finite floats"),
    "direction without a tensor": (
        {"update_rule": rule_with(direction=lambda *_: None)},
        "`direction` of the `update_rule` test_custom_objects.Replaced returned NoneType",
    ),
    "direction with an unknown state": (
        {"update_rule": rule_with(direction=lambda g0, state, *_: state["v"])},
        "`direction` of the `update_rule` test_custom_objects.Replaced failed: KeyError: 'v'",
    ),
    "decay of 1": ({"update_rule": rule_with(decay=lambda steps: 1.0)}, "returned 1.0; it must be a number in [0, 1)"),
}


@pytest.mark.parametrize(("options", "message"), INVALID.values(), ids=INVALID)
def test_invalid_custom_objects_are_refused_at_once(options, message):
    with pytest.raises(AutoPruneError, match=re.escape(message)):
        AutoPruneCallback(**options)


def test_custom_objects_can_be_named_in_a_lightning_cli_configuration():
    arguments = {
        "trainer": {
            "callbacks": {
                "class_path": "lightning_autoprune.AutoPruneCallback",
                "init_args": {
                    "schedule": "test_custom_objects.drop_early",
                    "estimator": "test_custom_objects.bell",
                    "update_rule": {"class_path": "test_custom_objects.Momentum"},
                },
            }
        }
    }
    cli = LightningCLI(Net, run=False, args=arguments, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, AutoPruneCallback)]
    assert callback.settings.schedule is drop_early
    assert callback.settings.estimator is bell
    assert isinstance(callback.settings.update_rule, Momentum)
