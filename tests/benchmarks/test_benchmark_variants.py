"""The benchmarks' variants of the method: each does what its name says."""

from __future__ import annotations

import pytest
import torch
from harness.methods import METHODS
from harness.methods.variants import _overshoot
from lightning.pytorch import Callback
from peers import make_task, mlp, run_watched
from torch import nn


def normalized():
    return nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 3))


def trained(name, network=mlp, **options):
    return run_watched(METHODS[name](7, **options), make_task(network, (12,)), Callback())[1]


def weights(name, **options):
    return torch.cat([p.detach().flatten() for p in trained(name, **options).parameters()])


def test_a_variant_with_nothing_changed_is_the_plain_callback():
    assert torch.equal(weights("variant"), weights("autoprune"))


@pytest.mark.parametrize("option", [{"power": 2}, {"memory": 2}, {"regrowth": 0.3}, {"distillation": 1.0}])
def test_each_option_changes_the_run(option):
    assert not torch.equal(weights("variant", **option), weights("autoprune"))


def test_regrowth_goes_beyond_the_target_and_then_lets_weights_back():
    assert _overshoot(0.7499, 1.0, 0.1, regrowth=0.25) == pytest.approx(0.08)
    assert _overshoot(0.76, 1.0, 0.1, regrowth=0.25) == 1.0


def test_the_teacher_is_the_dense_network_and_agrees_with_itself():
    method = METHODS["variant"](7, distillation=1.0)
    run_watched(method, make_task(mlp, (12,)), Callback())
    assert all(p.all() for p in method._teacher.parameters())  # nothing is pruned in it
    inputs = torch.randn(8, 12)
    method._passed = inputs, method._teacher(inputs)
    assert method.penalty(method._teacher) == pytest.approx(0, abs=1e-6)
    method._passed = inputs, torch.zeros(8, 3)
    p = method._teacher(inputs).softmax(-1)
    assert method.penalty(method._teacher) == pytest.approx(float((p * (3 * p).log()).sum(-1).mean()), rel=1e-4)


def test_batchnorm_statistics_are_means_over_the_training_rows_at_the_end():
    task = make_task(normalized, (12,))
    network = run_watched(METHODS["variant"](7, batchnorm=True), task, Callback())[1]
    rows = network[0](task.data(None).train[0])
    torch.testing.assert_close(network[1].running_mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    plain = trained("autoprune", normalized)
    assert not torch.allclose(plain[1].running_mean, rows.mean(0), rtol=1e-3)
