from __future__ import annotations

import copy

import pytest
import torch
from architectures import HEAD_KINDS, CountedHeads, Encoder, FixedHeads, prune_randomly
from torch import nn

from lightning_autoprune import model_cost, prunable_weights, shrink
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.granularity import NeuronGranularity
from lightning_autoprune.model.attention_heads import group_attention_heads
from lightning_autoprune.model.channels import find_channels
from lightning_autoprune.model.prunable_neurons import find_neurons
from lightning_autoprune.model.removal_trial import RemovalTrial

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


def network(kind, seed=0):
    torch.manual_seed(seed)
    return CountedHeads(kind)


def channels_of(model, x=X):
    return group_attention_heads(model, find_channels(model, x), RemovalTrial(model, x))


def heads_of(model, x=X):
    return [channel for channel in channels_of(model, x) if channel.counted_in]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_each_head_is_one_channel_of_rows_and_columns(kind):
    model = network(kind)
    heads = heads_of(model)
    assert len(heads) == 4
    assert [head.read_by for head in heads] == [{"out": list(range(4 * i, 4 * i + 4))} for i in range(4)]
    third = list(range(8, 12))
    if kind == "separate":
        assert heads[2].made_by == {"q": third, "k": third, "v": third}
    elif kind == "interleaved":
        assert heads[2].made_by == {"qkv": list(range(24, 36))}
    else:
        assert heads[2].made_by == {"qkv": [*third, *range(24, 28), *range(40, 44)]}
    counts = {"heads": 1, "inner": 4} if kind == "counted" else {"heads": 1}
    assert heads[2].counted_in == {"": counts}
    assert not any(head.fixed_reason for head in heads)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_each_row_belongs_to_one_channel_and_the_feed_forward_channels_stay_separate(kind):
    channels = channels_of(network(kind))
    rows = [(name, i) for channel in channels for name, indices in channel.made_by.items() for i in indices]
    assert len(rows) == len(set(rows))
    assert sum(channel.made_by.keys() == {"up"} and not channel.fixed_reason for channel in channels) == 16


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_removing_dead_heads_leaves_the_outputs_unchanged(kind):
    model = network(kind)
    for head in (heads_of(model)[i] for i in (1, 3)):
        model.out.weight.data[:, head.read_by["out"]] = 0
    small = shrink(model, X[:2])
    assert (small.heads, small.out.in_features) == (2, 8)
    assert {n: m.out_features for n, m in small.named_modules() if n in ("q", "k", "v", "qkv")} == (
        {"q": 8, "k": 8, "v": 8} if kind == "separate" else {"qkv": 24}
    )
    torch.testing.assert_close(small(X), model(X))
    assert model.heads == 4


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_one_head_remains_if_all_are_dead(kind):
    model = network(kind)
    model.out.weight.data.zero_()
    small = shrink(model, X[:2])
    assert small.heads == 1
    torch.testing.assert_close(small(X), model(X))


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_shrink_removes_exactly_the_masked_heads(kind, seed):
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


def test_heads_that_interact_are_not_grouped():
    class InteractingHeads(CountedHeads):
        """A block that mixes the heads with each other, so that none can be removed alone."""

        def forward(self, x):
            q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(self.embed(x)).chunk(3, -1))
            return self.last(self.out(((q @ k.mT).softmax(-1) @ v).flatten(2)))

    torch.manual_seed(0)
    assert heads_of(InteractingHeads()) == []


def test_heads_stay_if_their_number_is_written_into_the_forward():
    model = FixedHeads()
    model.heads = 4
    x = torch.randn(2, 7, 16)
    assert heads_of(model, x) == []
    model.project.weight.data[:, :4] = 0
    torch.testing.assert_close(shrink(model, x)(x), model(x))


def test_heads_stay_if_the_forward_raises_for_another_number():
    class Refusing(CountedHeads):
        def forward(self, x):
            return super().forward(x) * {4: 0.5}[self.heads]

    assert heads_of(Refusing()) == []


def test_heads_stay_if_their_number_can_not_be_set():
    class ReadOnly(CountedHeads):
        @property
        def heads(self):
            return self.count

    model = network("separate")
    model.count = vars(model).pop("heads")
    model.__class__ = ReadOnly
    assert heads_of(model) == []
    torch.testing.assert_close(shrink(model, X[:2])(X), model(X))


def test_heads_of_multihead_attention_stay():
    model = Encoder()
    assert heads_of(model, torch.zeros(2, 4, 6)) == []


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_finding_heads_leaves_the_model_as_it_was(kind):
    model = network(kind)
    before = copy.deepcopy(model)
    channels_of(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert (model.heads, model.inner, model.training) == (before.heads, before.inner, before.training)


@pytest.mark.parametrize("density", [0.02, 0.1])
@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_pruned_block_gives_the_same_outputs_when_shrunk(kind, density):
    model = prune_randomly(network(kind), density)
    torch.testing.assert_close(shrink(model, X[:2])(X), model(X), rtol=1e-4, atol=1e-5)


def test_heads_of_a_submodule_are_counted_under_its_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(CountedHeads("fused"), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(2, 5, 4)
    assert [head.counted_in for head in heads_of(model, x)] == [{"2.0": {"heads": 1}}] * 4
