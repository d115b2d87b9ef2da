from __future__ import annotations

import copy

import pytest
import torch
from architectures import HEADS, Attention, Encoder, Heads, prune
from torch import nn

from lightning_autoprune import model_cost, prunable_weights, shrink
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.granularity import NeuronGranularity
from lightning_autoprune.model.attention_heads import with_heads
from lightning_autoprune.model.channels import find_channels
from lightning_autoprune.model.prunable_neurons import find_neurons

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def network(kind, seed=0):
    torch.manual_seed(seed)
    return Heads(kind)


def channels_of(model, x=X):
    return with_heads(model, find_channels(model, x), x)


def heads_of(model, x=X):
    return [channel for channel in channels_of(model, x) if channel.counted]


@pytest.mark.parametrize("kind", HEADS)
def test_each_head_is_a_channel_of_rows_and_columns(kind):
    model = network(kind)
    heads = heads_of(model)
    assert len(heads) == 4
    assert [head.read for head in heads] == [{"out": list(range(4 * i, 4 * i + 4))} for i in range(4)]
    third = list(range(8, 12))
    if kind == "separate":
        assert heads[2].made == {"q": third, "k": third, "v": third}
    elif kind == "interleaved":
        assert heads[2].made == {"qkv": list(range(24, 36))}
    else:
        assert heads[2].made == {"qkv": [*third, *range(24, 28), *range(40, 44)]}
    counts = {"heads": 1, "inner": 4} if kind == "counted" else {"heads": 1}
    assert heads[2].counted == {"": counts}
    assert not any(head.fixed for head in heads)


@pytest.mark.parametrize("kind", HEADS)
def test_each_row_is_in_one_channel_and_the_feed_forward_part_keeps_its_own(kind):
    channels = channels_of(network(kind))
    rows = [(name, i) for channel in channels for name, indices in channel.made.items() for i in indices]
    assert len(rows) == len(set(rows))
    assert sum(channel.made.keys() == {"up"} and not channel.fixed for channel in channels) == 16


@pytest.mark.parametrize("kind", HEADS)
def test_a_dead_head_is_removed_and_the_function_stays(kind):
    model = network(kind)
    for head in (heads_of(model)[i] for i in (1, 3)):
        model.out.weight.data[:, head.read["out"]] = 0
    small = shrink(model, X[:2])
    assert (small.heads, small.out.in_features) == (2, 8)
    assert {n: m.out_features for n, m in small.named_modules() if n in ("q", "k", "v", "qkv")} == (
        {"q": 8, "k": 8, "v": 8} if kind == "separate" else {"qkv": 24}
    )
    torch.testing.assert_close(small(X), model(X))
    assert model.heads == 4


@pytest.mark.parametrize("kind", HEADS)
def test_one_head_stays_if_all_are_dead(kind):
    model = network(kind)
    model.out.weight.data.zero_()
    small = shrink(model, X[:2])
    assert small.heads == 1
    torch.testing.assert_close(small(X), model(X))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("seed", range(3))
def test_masked_heads_are_what_shrink_removes(kind, seed):
    model = network(kind, seed)
    neurons = find_neurons(model, prunable_weights(model), X)
    weights = {name: prunable_weights(model)[name] for name in neurons.rows}
    aux = AuxiliaryParameters(weights, granularity=NeuronGranularity(neurons))
    generator = torch.Generator().manual_seed(seed)
    aux.M[0].copy_(torch.randn(neurons.count, generator=generator))
    heads = next(group for group in neurons.groups if len(group) == 4)
    aux.M[0][heads[seed]] = -1.0
    aux.update_masks()
    before = model(X)
    aux.finalize_masks()
    torch.testing.assert_close(model(X), before)
    small = shrink(model, X[:2])
    torch.testing.assert_close(small(X), before)
    left = {len(group): int(aux.granularity.alive[group].sum()) for group in neurons.groups}
    assert left == {4: small.heads, 12: small.embed.out_features, 16: small.up.out_features}
    assert small.heads < 4
    cost = {name: layer.parameters for name, layer in model_cost(small, X[:2]).layers.items()}
    kept = sum(cost[name] - small.get_submodule(name).out_features * (name != "k") for name in neurons.rows)
    assert kept == pytest.approx(aux.density * sum(neurons.sizes.values()))


def test_heads_that_differ_from_the_guess_stay():
    class Odd(Heads):
        """Mixes the heads with each other, so that none can go alone."""

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(self.embed(x)).chunk(3, -1))
            return self.last(self.out(((q @ k.mT).softmax(-1) @ v).flatten(2)))

    torch.manual_seed(0)
    assert heads_of(Odd()) == []


def test_a_forward_with_the_number_of_heads_in_it_keeps_them():
    model = Attention()
    model.heads = 4
    x = torch.randn(2, 7, 16)
    assert heads_of(model, x) == []
    model.project.weight.data[:, :4] = 0
    torch.testing.assert_close(shrink(model, x)(x), model(x))


def test_a_forward_that_refuses_another_number_of_heads_in_its_own_way_keeps_them():
    class Refusing(Heads):
        def forward(self, x):
            return super().forward(x) * {4: 0.5}[self.heads]

    assert heads_of(Refusing()) == []


def test_a_number_of_heads_that_can_not_be_set_keeps_them():
    class ReadOnly(Heads):
        @property
        def heads(self):
            return self.count

    model = network("separate")
    model.count = vars(model).pop("heads")
    model.__class__ = ReadOnly
    assert heads_of(model) == []
    torch.testing.assert_close(shrink(model, X[:2])(X), model(X))


def test_multihead_attention_keeps_its_heads():
    model = Encoder()
    assert heads_of(model, torch.zeros(2, 4, 6)) == []


@pytest.mark.parametrize("kind", HEADS)
def test_the_model_is_left_as_it_was(kind):
    model = network(kind)
    before = copy.deepcopy(model)
    channels_of(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert (model.heads, model.inner, model.training) == (before.heads, before.inner, before.training)


@pytest.mark.parametrize("density", [0.02, 0.1])
@pytest.mark.parametrize("kind", HEADS)
def test_a_pruned_block_is_the_same_function_when_shrunk(kind, density):
    model = prune(network(kind), density)
    torch.testing.assert_close(shrink(model, X[:2])(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_block_inside_a_model_is_found_by_its_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(Heads("fused"), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(2, 5, 4)
    assert [head.counted for head in heads_of(model, x)] == [{"2.0": {"heads": 1}}] * 4
