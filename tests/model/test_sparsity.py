from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics import MetricCollection

from lightning_autoprune.model.sparsity import Sparsity, layer_sparsity, sparsity

tensors = st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.0, -2.0]), max_size=20), min_size=1, max_size=4)


def model() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    with torch.no_grad():
        network[0].weight.fill_(1)[0] = 0
        network[2].weight.fill_(3)
    return network


@given(tensors)
def test_function_and_metric_return_the_fraction_of_zeros(lists):
    weights = {str(i): torch.tensor(values) for i, values in enumerate(lists)}
    entries = [x for values in lists for x in values]
    expected = sum(x == 0 for x in entries) / len(entries) if entries else 0
    metric = Sparsity()
    for weight in weights.values():
        metric.update(weight)
    assert sparsity(weights) == expected
    assert metric.compute().item() == pytest.approx(expected)


def test_the_sparsity_of_a_model_counts_its_prunable_weights():
    assert sparsity(model()) == 4 / 10
    assert layer_sparsity(model()) == {"0": 0.5, "2": 0.0}
    metric = Sparsity()
    metric.update(model())
    assert metric.compute() == 0.4


def test_the_weights_of_a_frozen_model_are_counted():
    assert sparsity(model().requires_grad_(False)) == 0.4


def test_reset_discards_earlier_counts():
    metric = Sparsity()
    metric.update(torch.zeros(3))
    metric.reset()
    metric.update(torch.ones(3))
    assert metric.compute() == 0


def test_the_sparsity_of_no_weights_is_zero():
    assert sparsity({}) == 0
    assert sparsity(torch.empty(0)) == 0


def test_counts_of_two_processes_add_up():
    a, b = Sparsity(), Sparsity()
    a.update(torch.zeros(4))
    b.update(torch.ones(12))
    a.zeros, a.total = a.zeros + b.zeros, a.total + b.total  # as the sum over processes does
    assert a.compute() == 0.25


def test_plot_draws_a_value_and_a_curve():
    metric = Sparsity()
    metric.update(torch.tensor([0.0, 1.0]))
    _, axes = metric.plot()
    assert axes.get_ylim()[1] >= 1
    values = [metric(torch.tensor([0.0, 1.0])), metric(torch.zeros(4))]
    _, axes = metric.plot(values)
    assert axes.lines[0].get_ydata().tolist() == [0.5, 1.0]
    plt.close("all")


@pytest.mark.parametrize("convert", ["set_dtype", "half", "parent", "collection"])
def test_counts_stay_exact_integers_in_every_dtype(convert):
    metric = Sparsity()
    if convert == "set_dtype":
        metric.set_dtype(torch.bfloat16)
    elif convert == "half":
        metric.half()
    elif convert == "parent":
        parent = nn.ModuleList([metric]).half()
        assert parent.bfloat16().type(torch.float16)[0] is metric
    else:
        MetricCollection([metric]).set_dtype(torch.float16)
    count = 2**24 + 1  # float32 has no such number
    metric.update(torch.zeros(()).expand(count))
    metric.update(torch.ones(()).expand(2))
    assert (int(metric.zeros), int(metric.total)) == (count, count + 2)
    metric.reset()
    assert metric.total.dtype == torch.int64


def test_the_metric_and_a_module_that_has_one_can_be_scripted():
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.metric = nn.Linear(4, 2), Sparsity()

        def forward(self, x):
            return self.layer(x)

    torch.jit.script(Sparsity())
    module = Scripted()
    x = torch.randn(3, 4)
    assert torch.equal(torch.jit.script(module)(x), module(x))
