from __future__ import annotations

import copy
import re

import pytest
import torch
from architectures import DIFFICULT, EXACT, Shuffled, UsedTwice
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_autoprune.model.channels import Channel, find_channels
from lightning_autoprune.model.removal_trial import RemovalTrial, fix_unremovable, narrow_down


def network_and_channels(name):
    make, shape = {**EXACT, **DIFFICULT}[name]
    network = make()
    return network, find_channels(network, torch.zeros(2, *shape))


def test_channels_whose_readers_the_graph_gets_wrong_are_fixed():
    found = {}
    for name in (*EXACT, "shuffled", "softmax", "gated", "twice", "attention", "upsampler"):
        network, channels = network_and_channels(name)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        fixed = {id(channel) for channel in channels if channel.fixed_reason}
        fix_unremovable(channels, RemovalTrial(network, torch.zeros(2, *{**EXACT, **DIFFICULT}[name][1])))
        found[name] = {
            channel.fixed_reason for channel in channels if channel.fixed_reason and id(channel) not in fixed
        }
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    for name, layer in (("shuffled", "a"), ("softmax", "0"), ("attention", "qkv")):
        (reason,) = found[name]
        assert reason.startswith(f"without some channels of {layer!r} an output changes by")
    assert "Provided sizes [10, 2, 2] don't multiply up" in found["upsampler"].pop()
    assert not any(found[name] for name in (*EXACT, "gated", "twice"))


class Counting(nn.Module):
    """A network whose code depends on the number of channels between its layers."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first = kind, nn.Linear(12, 16)
        self.a, self.b = nn.Linear(16, 64), nn.Linear(32 if kind in ("split", "glu") else 64, 4)
        self.register_buffer("gain", torch.full((64,), 2.0))

    def forward(self, x):
        x = self.a(self.first(x).relu())
        if self.kind == "split":
            values, gates = x.split(32, -1)
            x = values * F.silu(gates)
        elif self.kind == "glu":
            x = F.glu(x)
        elif self.kind == "buffer":
            x = x * self.gain
        elif self.kind == "scaled":
            x = x / x.shape[-1] ** 0.5
        elif self.kind == "view":
            x = x.view(-1, 64)
        elif self.kind == "zeros":
            x = x + torch.zeros(len(x), 64)
        elif self.kind == "normalized":
            x = F.normalize(x, dim=-1)
        return self.b(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("split", r"it does not run \(not enough values to unpack"),
        ("buffer", r"it does not run \(The size of tensor"),
        ("view", r"it does not run \(mat1 and mat2 shapes"),
        ("zeros", r"it does not run \(The size of tensor"),
        ("scaled", "an output changes by"),
        ("normalized", "an output changes by"),
    ],
)
def test_channels_stay_where_the_code_depends_on_their_number(kind, why):
    network, x = Counting(kind), torch.zeros(4, 12)
    channels = find_channels(network, x)
    fix_unremovable(channels, RemovalTrial(network, x))
    reasons = {channel.fixed_reason for channel in channels if "a" in channel.made_by}
    assert len(reasons) == 1
    assert re.match(rf"without some channels of 'a' {why}", reasons.pop())
    assert not any(channel.fixed_reason for channel in channels if "first" in channel.made_by)


def test_the_same_network_without_such_code_keeps_its_channels_removable():
    network, x = Counting("plain"), torch.zeros(4, 12)
    channels = find_channels(network, x)
    fix_unremovable(channels, RemovalTrial(network, x))
    assert {layer for c in channels if not c.fixed_reason for layer in c.made_by} == {"first", "a"}


class PassCounter(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.passes = [0]  # a list, which copies share

    def forward(self, x):
        self.passes[0] += 1
        return self.network(x)

    def __deepcopy__(self, memo):
        copied = PassCounter(copy.deepcopy(self.network, memo))
        copied.passes = self.passes
        return copied


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "encoder"])
def test_seven_passes_show_that_all_channels_can_be_removed(name):
    network, channels = network_and_channels(name)
    counter = PassCounter(network)
    for channel in channels:
        for part in ("made_by", "passes", "read_by"):
            setattr(channel, part, {f"network.{layer}": slices for layer, slices in getattr(channel, part).items()})
    fix_unremovable(channels, RemovalTrial(counter, torch.zeros(2, *EXACT[name][1])))
    assert counter.passes == [7]
    assert any(not channel.fixed_reason for channel in channels)


def test_a_scale_of_zero_hides_nothing():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale, self.b = nn.Linear(5, 8), nn.Parameter(torch.zeros(1)), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(x.new_ones(len(x), 8) + self.scale * self.a(x).flip(-1))

    network, x = Scaled(), torch.zeros(2, 5)
    channels = [Channel(made_by={"a": [i]}, read_by={"b": [i]}) for i in range(8)]
    fix_unremovable(channels, RemovalTrial(network, x))
    assert all(channel.fixed_reason for channel in channels)
    assert network.scale.item() == 0


def test_a_trial_leaves_its_copy_as_it_was():
    network, channels = network_and_channels("mobilenet")
    trial = RemovalTrial(network, torch.zeros(2, 3, 16, 16))
    before = {name: value.clone() for name, value in trial._model.state_dict().items()}
    sizes = str(trial._model)
    fix_unremovable(channels, trial)
    assert str(trial._model) == sizes
    assert all(torch.equal(value, before[name]) for name, value in trial._model.state_dict().items())


@given(st.sets(st.integers(0, 19)), st.integers(0, 20))
def test_narrowing_down_finds_all_bad_items(bad, count):
    passing, failing = narrow_down(range(count), lambda some: "bad" if bad.intersection(some) else "")
    assert sorted(passing) == sorted(set(range(count)) - bad)
    assert sorted(failing) == [(i, "bad") for i in sorted(bad & set(range(count)))]


def test_items_that_fail_only_together_are_told_apart():
    passing, failing = narrow_down("abcd", lambda some: "both" if {"b", "d"} <= set(some) else "")
    assert passing == ["a", "b", "c"]
    assert failing == [("d", "both")]


def test_entangled_channels_are_fixed_even_if_the_outputs_have_an_offset():
    class Centered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.b.bias.data.fill_(1e3)

        def forward(self, x):
            y = 0.1 * self.a(x).relu()
            return self.b(y - y.mean(-1, keepdim=True))

    network, x = Centered(), torch.randn(4, 5)
    channels = [Channel(made_by={"a": [i]}, read_by={"b": [i]}) for i in range(8)]
    fix_unremovable(channels, RemovalTrial(network, x))
    assert all(channel.fixed_reason for channel in channels)


@pytest.mark.parametrize(
    "permute",
    [
        lambda x: x.flip(-1),
        lambda x: x.roll(2, -1),
        lambda x: torch.cat([x[:, :-2], x[:, -2:].flip(-1)], -1),  # the last two change places
    ],
)
@pytest.mark.parametrize("size", [5, 7, 8, 31])
def test_every_permutation_of_the_channels_is_detected(permute, size):
    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, size), nn.Linear(size, 3)

        def forward(self, x):
            return self.b(permute(self.a(x).relu()))

    network, x = Permuted(), torch.zeros(2, 5)
    channels = [Channel(made_by={"a": [i]}, read_by={"b": [i]}) for i in range(size)]
    fix_unremovable(channels, RemovalTrial(network, x))
    assert all(channel.fixed_reason for channel in channels)


def test_channels_in_another_order_are_removable_if_the_graph_knows_it():
    network, x = Shuffled(), torch.zeros(2, 5)
    channels = [Channel(made_by={"a": [i]}, read_by={"b": [5 - i]}) for i in range(6)]
    fix_unremovable(channels, RemovalTrial(network, x))
    assert not any(channel.fixed_reason for channel in channels)


def test_a_network_that_stores_an_activation_can_be_checked():
    class StoresActivation(UsedTwice):
        def forward(self, x):
            self.features = self.a(x)
            return self.c(torch.relu(self.features))

    network, x = StoresActivation(), torch.zeros(2, 5)
    channels = find_channels(network, x)
    fix_unremovable(channels, RemovalTrial(network, x))
    assert not any(channel.fixed_reason for channel in channels if "a" in channel.made_by)
