"""The callback does not touch the user's run: weights, logs, metrics and random numbers are the same, bit for bit."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Net, csv_logger, csv_rows, fit, loader, same
from lightning.pytorch import Callback
from torch.nn.utils.parametrizations import spectral_norm

from lightning_autoprune import AutoPruneCallback


def trace(callback, folder: str, **options):
    """Return everything that a run leaves behind."""
    model, t = fit(
        callback,
        train=loader(shuffle=True),
        val=loader(seed=3),
        model_options={"noisy": True},
        logger=csv_logger(Path(folder)),
        epochs=3,
        **options,
    )
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": t.optimizers[0].state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate()[1],
        "logs": csv_rows(Path(folder)),
        "metrics": {k: float(v) for k, v in t.callback_metrics.items() if not k.startswith("autoprune")},
    }


@pytest.mark.parametrize("off", [{"enabled": False}, {"warmup": 1.0}], ids=str)
def test_a_disabled_callback_changes_nothing(off):
    assert same(trace(None, "without"), trace(AutoPruneCallback(**off), "with"))


class StopAfterOneEpoch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.parametrize(("warmup", "expected"), [(0.4, True), (0.2, False)], ids=["dense", "pruning"])
def test_the_default_callback_changes_nothing_until_the_dense_phase_ends(warmup, expected):
    callback = AutoPruneCallback(target_sparsity=0.5, warmup=warmup)
    with_it = trace([callback, StopAfterOneEpoch()], "with")  # one epoch of three
    assert same(trace([StopAfterOneEpoch()], "without"), with_it) == expected


NO_PRUNING = {"pressure": 1e-30, "auxiliary_lr": 1e-30}  # M is trained, and no mask ever changes
SOURCES = {
    "loader": {"held_out": loader(seed=9, shuffle=True)},
    "val": {"held_out": "val"},
    "train": {"held_out": "train"},
}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_held_out_passes_change_nothing_while_no_weight_is_pruned(source, options):
    callback = AutoPruneCallback(**NO_PRUNING, **SOURCES[source], warmup=0.2, finetune=0.2)
    assert same(trace(None, "without", **options), trace(callback, "with", **options))
    assert callback.sparsity == 0
    assert callback._run.pruner.masks_final
    assert callback._run.pruner.auxiliary.scale.updates > 5


def test_the_comparison_can_fail():
    callback = AutoPruneCallback(held_out="train", target_sparsity=0.1)
    assert not same(trace(None, "without"), trace(callback, "with"))


class Distilled(Net):
    """Has a teacher: an average of a layer that ``training_step`` updates."""

    def __init__(self, average):
        super().__init__()
        self.teacher, self.average = copy.deepcopy(self.first).requires_grad_(False), average

    @torch.no_grad()
    def _average(self, teacher, weight):
        if self.average == "counted":
            teacher.lerp_(weight, 0.1)
        elif self.average == "data":
            teacher.data.mul_(0.9).add_(0.1 * weight)
        else:
            teacher.data = 0.9 * teacher.data + 0.1 * weight

    def training_step(self, batch):
        self._average(self.teacher.weight, self.first.weight)
        return super().training_step(batch)


@pytest.mark.parametrize("average", ["counted", "data", "another tensor"])
def test_a_teacher_is_averaged_once_per_step(average):
    def trained(callback):
        torch.manual_seed(0)
        return dict(fit(callback, Distilled(average), val=loader())[0].state_dict())

    assert same(trained(None), trained(AutoPruneCallback(**NO_PRUNING, held_out="val")))


def test_a_parametrization_of_an_excluded_layer_is_not_computed_twice():
    def trained(callback):
        torch.manual_seed(0)
        model = Net()
        spectral_norm(model.last)
        return dict(fit(callback, model)[0].state_dict())

    assert same(trained(None), trained(AutoPruneCallback(**NO_PRUNING, held_out="train", exclude=["last"])))
