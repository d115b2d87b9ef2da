"""Estimators, update rules and schedules of the user's own, in a real run."""

from __future__ import annotations

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


def stairs(progress: float, start: float, target: float) -> float:
    return start if progress < 0.3 else target


OWN = {"update_rule": Momentum(), "estimator": bell, "schedule": stairs}


@pytest.mark.parametrize("setting", OWN)
def test_an_object_of_the_users_own_changes_the_run_and_meets_the_target(setting):
    runs = {}
    for name, options in (("own", {setting: OWN[setting]}), ("default", {})):
        callback = AutoPruneCallback(target_sparsity=0.8, **options)
        model, _ = fit(callback)
        assert callback.sparsity == pytest.approx(0.8, abs=0.01)
        runs[name] = {key: value.clone() for key, value in model.state_dict().items()}
    assert not same(runs["own"], runs["default"])


@pytest.mark.parametrize("step", [12, 20])
def test_a_run_with_own_objects_resumes_bit_for_bit(step, recwarn):
    def run(**options):
        callback = AutoPruneCallback(target_sparsity=0.8, **OWN)
        keep = saving(every_n_train_steps=1, save_on_train_epoch_end=False)
        return fit([callback, keep], train=Resumable(), enable_checkpointing=True, **options)[0]

    whole = {key: value.clone() for key, value in run().state_dict().items()}
    resumed = run(ckpt_path=f"checkpoints/step={step}.ckpt")
    assert same(whole, dict(resumed.state_dict()))
    assert not [w for w in recwarn if "other settings" in str(w.message)]


def test_resuming_with_another_rule_of_the_users_own_is_refused():
    class Other(Momentum):
        state_names = ("slow", "fast")

    _, t = fit(AutoPruneCallback(target_sparsity=0.8, update_rule=Momentum()), epochs=2, max_steps=14)
    t.save_checkpoint("half.ckpt")
    with pytest.raises(
        AutoPruneError, match="of another update rule than '.*Other': resume with the same `update_rule`"
    ):
        fit(AutoPruneCallback(target_sparsity=0.8, update_rule=Other()), epochs=4, ckpt_path="half.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": lambda M: M[0]}, r"returned shape \(3,\) for an M of shape \(2, 3\); it must return finite"),
        ({"estimator": lambda M: 1.0}, r"returned float for an M of shape \(2, 3\)"),
        ({"update_rule": Momentum}, r"`update_rule` is <class .*Momentum'>; allowed are 'adaptive', .* or an instance"),
        ({"estimator": 3}, "`estimator` is 3; allowed are 'linear', .* or a function of M"),
    ],
)
def test_an_object_that_can_not_work_is_refused_at_once(options, message):
    with pytest.raises(AutoPruneError, match=message):
        AutoPruneCallback(**options)


def test_own_objects_can_be_named_in_the_configuration_of_the_lightning_cli():
    arguments = {
        "trainer": {
            "callbacks": {
                "class_path": "lightning_autoprune.AutoPruneCallback",
                "init_args": {
                    "schedule": "test_own_objects.stairs",
                    "estimator": "test_own_objects.bell",
                    "update_rule": {"class_path": "test_own_objects.Momentum"},
                },
            }
        }
    }
    cli = LightningCLI(Net, run=False, args=arguments, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, AutoPruneCallback)]
    assert callback.settings.schedule is stairs
    assert callback.settings.estimator is bell
    assert isinstance(callback.settings.update_rule, Momentum)
