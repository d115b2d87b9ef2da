"""Dead channels are removed, and the constants that they add move into biases."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from architectures import assert_same_outputs
from torch import nn

from lightning_autoprune.deploy.shrink import shrink


def test_neurons_without_inputs_or_readers_are_removed_and_their_constants_move_into_the_bias():
    network = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2, bias=False))
    network[0].weight.data[0] = 0  # constant: sigmoid of its bias
    network[2].weight.data[:, 1] = 0  # not read
    small = shrink(network, torch.zeros(1, 3))
    assert torch.equal(small[0].weight, network[0].weight[2:])
    torch.testing.assert_close(small[2].bias, network[2].weight[:, 0] * network[0].bias[0].sigmoid())
    assert_same_outputs(network, small, (3,))


def test_one_dead_channel_makes_others_dead():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    network[4].weight.data[:, 0] = 0  # so neuron 0 of the second layer is not read,
    network[2].weight.data[1, 1] = 0  # and it was the only reader of neuron 1 of the first
    small = shrink(network, torch.zeros(1, 3))
    assert [tuple(small[i].weight.shape) for i in (0, 2, 4)] == [(1, 3), (1, 1), (2, 1)]
    assert_same_outputs(network, small, (3,))


def test_one_channel_of_a_layer_remains_if_all_are_dead():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network[0].weight.data.zero_()
    small = shrink(network, torch.zeros(1, 3))
    assert (small[0].out_features, small[2].in_features, small[2].out_features) == (1, 1, 2)
    assert_same_outputs(network, small, (3,))


def test_a_constant_stays_if_a_zero_padded_convolution_reads_it():
    def network(**options):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 3, **options), nn.Flatten())
        made[0].weight.data[0] = 0
        return made

    for options, left in (
        ({"padding": 1}, 3),
        ({"padding": "same"}, 3),
        ({"padding": 1, "padding_mode": "reflect"}, 2),
        ({"padding": "valid"}, 2),
        ({}, 2),
    ):
        made = network(**options)
        small = shrink(made, torch.zeros(2, 1, 8, 8))
        assert small[0].out_channels == left
        assert_same_outputs(made, small, (1, 8, 8))


def test_a_relu_that_is_off_for_all_tried_inputs_is_not_dead():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    network[0].bias.data[0] = -1000.0  # off for all inputs that are tried
    assert shrink(network, torch.zeros(1, 3))[0].out_features == 4


class Padded(nn.Module):
    """Finds padding, which the example does not have, by a comparison, which stops NaN."""

    def __init__(self, integers: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0) if integers else nn.Identity()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        kept = (x != 0).any(-1) if x.is_floating_point() else x != 0
        return self.last(self.first(self.embed(x)).relu() * kept[..., None]).sum(1)


@pytest.mark.parametrize("integers", [True, False])
def test_a_constant_stays_if_padding_makes_it_zero(integers):
    network = Padded(integers)
    network.first.weight.data[2:] = 0
    network.first.bias.data.fill_(0.7)
    example = torch.randint(1, 20, (4, 5)) if integers else torch.randn(4, 5, 6)
    small = shrink(network, example)
    example[:, 3:] = 0
    torch.testing.assert_close(small(example), network(example))
    assert small.first.out_features == 8


class Coded(nn.Module):
    """Returns integers that depend on the channels."""

    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.last, self.code = nn.Linear(5, 8), nn.Linear(8, 3), code

    def forward(self, x):
        h = self.first(x)
        return self.last(h.relu()), self.code(h)


@pytest.mark.filterwarnings("ignore:The dead channels of")
@pytest.mark.parametrize("code", [lambda h: h.argmax(-1), lambda h: (h > 0).long().sum(-1), lambda h: h > 0])
def test_integer_outputs_stay_the_same(code):
    network = Coded(code)
    network.first.weight.data[:4] = 0
    network.first.bias.data[:4] = 0.1
    small, x = shrink(network, torch.randn(6, 5)), torch.randn(9, 5)
    assert torch.equal(small(x)[1], network(x)[1])


def test_a_buffer_that_the_forward_writes_to_is_restored():
    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return super().forward(x)

    network = Counting()
    network[0].weight.data[2:] = 0
    assert shrink(network, torch.randn(2, 3)).seen == network.seen == 0


@pytest.mark.parametrize(("layer", "shape"), [(nn.Linear(4, 3), (2, 4)), (nn.Conv2d(1, 2, 3), (2, 1, 4, 4))])
def test_a_single_layer_stays_as_it_is(layer, shape):
    assert_same_outputs(layer, shrink(layer, torch.randn(shape)), shape[1:])


class Masked(nn.Module):
    """Sums over the steps that a mask selects."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
        self.a.weight.data[2:] = 0

    def forward(self, x, mask):
        return self.b((torch.relu(self.a(x)) * mask[..., None]).sum(1))


@pytest.mark.parametrize("mask", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.int64)])
def test_a_constant_stays_if_a_mask_multiplies_it(mask):
    network, x = Masked(), torch.randn(2, 5, 4)
    small = shrink(network, (x, mask))
    other = torch.rand(2, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    torch.testing.assert_close(small(x, other), network(x, other))


@dataclass
class Batch:
    x: torch.Tensor
    t: torch.Tensor


class Shifted(nn.Module):
    """Adds an input to a dead channel without a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.a.weight.data[6:] = 0
        self.a.bias.data *= 4

    def forward(self, x, t=None):
        x, t = (x, t) if isinstance(x, torch.Tensor) else (x.x, x.t)
        return self.b(torch.relu(self.a(x) + t))


@pytest.mark.parametrize("t", [0.5, 1, True, torch.zeros(4, 1), torch.randn(4, 1), torch.tensor(0.5)])
def test_a_constant_stays_if_a_number_is_added_to_it(t):
    x, other = torch.randn(4, 4), torch.randn(4, 1)
    for seed in range(5):
        torch.manual_seed(seed)
        network = Shifted()
        for example in ((x, t), {"x": x, "t": t}):
            assert shrink(network, example).a.out_features == 16
        example = Batch(x[:1], t[:1] if isinstance(t, torch.Tensor) and t.dim() else t)
        torch.testing.assert_close(shrink(network, example)(x, other), network(x, other))


def test_a_constant_stays_if_an_integer_that_is_the_same_in_all_samples_changes_it():
    class Column(Shifted):
        def forward(self, x, ids):
            return super().forward(x, ids[:, :1].float())

    network, x = Column(), torch.randn(4, 4)
    small = shrink(network, (x, torch.tensor([[101, 5], [101, 7], [101, 9], [101, 2]])))
    ids = torch.randint(100, (4, 2))
    torch.testing.assert_close(small(x, ids), network(x, ids))


def test_constants_are_removed_if_the_input_reaches_them_only_through_weights():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Conv1d(8, 6, 1), nn.Linear(6, 2)
            self.norm, self.deep = nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1, groups=6)
            self.a.weight.data[:2] = 0  # constant: two rows without weights,
            self.norm.weight.data[2] = 0  # a channel that is multiplied by 0,
            self.deep.weight.data[3] = 0  # and one that a depthwise convolution does not pass on

        def forward(self, x, i):
            x = torch.cat([x, self.embed(i)], -1).mT
            return self.b(self.deep(self.norm(self.a(x)).tanh()).sigmoid().mT)

    network, x, i = Mixed(), torch.randn(3, 5, 4), torch.tensor([[1, 7, 0, 2, 8]] * 3)
    small = shrink(network, (x, i))
    assert small.a.out_channels == small.b.in_features == 2
    torch.testing.assert_close(small.eval()(x, i), network.eval()(x, i))


class Readout(nn.Module):
    """Reads a sum or a mean over the samples."""

    def __init__(self, over_samples):
        super().__init__()
        self.a, self.b, self.over_samples = nn.Linear(4, 8), nn.Linear(8, 2), over_samples
        self.a.weight.data[:4] = 0

    def forward(self, x):
        return self.b(self.over_samples(self.a(x).sigmoid()))


@pytest.mark.parametrize(("over_samples", "shape"), [(lambda y: y.mean(0), (5, 4)), (nn.Identity(), (4,))])
def test_a_constant_that_a_layer_reads_as_a_vector_is_removed(over_samples, shape):
    network, x = Readout(over_samples), torch.randn(shape)
    small = shrink(network, x)
    assert (small.a.out_features, small.b.in_features) == (4, 4)
    torch.testing.assert_close(small(2 * x), network(2 * x))


def test_a_sum_over_samples_is_not_constant():
    network = Readout(lambda y: y.sum(0, keepdim=True))
    small, x = shrink(network, torch.randn(5, 4)), torch.randn(9, 4)
    torch.testing.assert_close(small(x), network(x))
