from __future__ import annotations

import pytest
import torch
from architectures import DIFFICULT, EXACT, prune_randomly
from helpers import FEATURES, Net, fit
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_autoprune import AutoPruneCallback, shrink
from lightning_autoprune.demo.networks import lenet5
from lightning_autoprune.model.cost import model_cost

ALL = {**EXACT, **DIFFICULT}


@pytest.mark.parametrize("name", ALL)
def test_dense_operations_equal_torchs_own_count(name):
    make, shape = ALL[name]
    network, inputs = make(), torch.zeros(2, *shape)
    cost = model_cost(network, inputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        network(inputs)
    assert cost.flops == counter.get_total_flops() > 0
    assert cost.parameters == sum(p.numel() for p in network.parameters())


def test_effective_operations_count_only_nonzero_weights():
    network = prune_randomly(lenet5(), 0.1)
    cost = model_cost(network, torch.zeros(1, 1, 28, 28))
    positions = {"0": 24 * 24, "3": 8 * 8, "7": 1, "9": 1}
    for name, layer in cost.layers.items():
        weight = network.get_submodule(name).weight
        assert layer.flops == 2 * positions[name] * weight.numel()
        assert layer.effective_flops == 2 * positions[name] * int(weight.count_nonzero())
        assert layer.kept == int(weight.count_nonzero()) + len(network.get_submodule(name).bias)
    assert cost.flops == sum(layer.flops for layer in cost.layers.values())
    assert cost.effective_flops == sum(layer.effective_flops for layer in cost.layers.values())


def test_zeros_in_gpt2s_linear_layers_are_not_counted():
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(nf=6, nx=4)
    layer.weight.data[:, :3] = 0
    cost = model_cost(layer, torch.zeros(5, 4))
    assert cost.flops == 2 * 5 * 4 * 6
    assert cost.effective_flops == cost.flops / 2


def test_a_shrunk_network_runs_fewer_operations_but_no_fewer_than_the_effective_ones():
    network, inputs = prune_randomly(lenet5(), 0.01), torch.zeros(1, 1, 28, 28)
    masked, small = model_cost(network, inputs), model_cost(shrink(network, inputs), inputs)
    assert small.effective_flops <= masked.effective_flops < small.flops < masked.flops


def test_attention_counts_as_dense_and_its_products_are_in_the_total():
    network = prune_randomly(EXACT["encoder"][0](), 0.1).eval()
    inputs = torch.zeros(2, 5, 6)
    with torch.no_grad():
        cost = model_cost(network, inputs)
    attention = cost.layers["layers.layers.0.self_attn"]
    assert attention.effective_flops == attention.flops > 2 * 10 * (48 * 16 + 16 * 16)
    assert cost.effective_flops < cost.flops
    assert torch.backends.mha.get_fastpath_enabled()


def test_counting_leaves_the_model_its_mode_and_the_random_state_as_they_were():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Noise())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    model_cost(network, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert network.training
    assert network[1].training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_counted(kind):
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    libraries = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    cost = model_cost(kind(3, 5, batch_first=True), torch.zeros(2, 7, 3))
    assert cost.flops == cost.layers[""].flops == 2 * gates * 5 * (3 + 5) * 2 * 7
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == libraries


def test_a_layer_with_two_names_is_counted():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            self.head = self.net[2]

        def forward(self, x):
            return self.net(x)

    network = Alias()
    network.head.weight.data[0] = 0
    cost = model_cost(network, torch.zeros(1, 4))
    assert (cost.flops, cost.effective_flops) == (96, 80)
    assert cost.layers["net.2"].flops == 32


class Tied(Net):
    """Three layers share one weight; the third runs on half of the samples."""

    def __init__(self):
        super().__init__(hidden=FEATURES)
        self.second, self.third = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.third.weight = self.first.weight
        self.example_input_array = torch.zeros(2, FEATURES)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.last((x + self.third(x[:1])).relu())


def test_operations_with_a_shared_weight_include_all_its_layers():
    network = Tied()
    network.first.weight.data[: FEATURES // 2] = 0
    cost = model_cost(network, network.example_input_array)
    one = 2 * 2 * FEATURES**2
    assert [cost.layers[name].flops for name in ("first", "second", "third")] == [one, one, one / 2]
    assert cost.flops_of("second") == cost.flops_of("first") == 2.5 * one
    assert cost.flops_of("last") == cost.layers["last"].flops
    for known in ({"first": 0.5}, {"third": 0.5}, {"first": 0.5, "second": 0.5}):
        assert cost.flops_left(known) == cost.effective_flops / cost.flops


def test_operations_with_a_shared_weight_are_logged_and_in_the_layer_table():
    callback, network = AutoPruneCallback(target_sparsity=0.9, exclude=["last"]), Tied()
    _, trainer = fit(callback, model=network)
    cost = model_cost(network, network.example_input_array)
    assert float(trainer.callback_metrics["autoprune/flops"]) == pytest.approx(cost.effective_flops / cost.flops)
    [row] = callback.layers()
    assert (row.name, row.flops) == ("first", cost.flops - cost.layers["last"].flops)


def test_an_embedding_tied_to_the_output_layer_has_its_operations():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i):
            return self.head(self.embed(i))

    cost = model_cost(Language(), torch.zeros(3, dtype=torch.int64))
    assert (cost.layers["embed"].flops, cost.flops_of("embed")) == (0, 240)
    assert cost.flops_left({"embed": 0.75}) == 0.25


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
    ],
)
def test_a_computed_weight_counts_as_dense(compute):
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), compute(nn.Linear(6, 4)))
    network[0].weight.data[:3] = 0
    before = {name: value.clone() for name, value in network.state_dict().items()}
    cost = model_cost(network, torch.zeros(1, 4))
    assert (cost.layers["2"].effective_flops, cost.effective_flops) == (48, cost.flops - 24)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
