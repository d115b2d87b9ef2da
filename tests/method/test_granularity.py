"""Granularities defined outside the package, combined with each update rule."""

from __future__ import annotations

import copy
import io
import math
from types import SimpleNamespace

import pytest
import torch
from granularities import Blocks, TwoOfFour
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from lightning_autoprune import AutoPruneError, AuxiliaryParameters
from lightning_autoprune.method.granularity import GRANULARITIES, WeightGranularity
from lightning_autoprune.method.update_rules import UPDATE_RULES

SHAPES = {"wide": (6, 16), "ragged": (5, 10), "conv": (3, 2, 2, 2), "large": (200, 120)}


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def take_steps(aux: AuxiliaryParameters, seeds, lr: float = 0.05, mu: float = 0.5) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        assert aux.step([torch.randn(w.shape, generator=generator) for w in aux.weights.values()], lr, mu)
        aux.update_masks()


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_block_steps_by_the_sum_over_its_weights(rule):
    """The expected step is computed slowly, block by block."""
    W = torch.randn(3, 8, dtype=torch.float64)
    aux = AuxiliaryParameters({"layer": W.clone()}, granularity=Blocks(), update_rule=rule)
    before, gradient, mu = aux.M[0].clone(), torch.randn(3, 8, dtype=torch.float64), 0.4
    assert aux.step([gradient], lr=0.1, mu=mu)
    G = torch.zeros(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(2):
            for k in range(4):
                w, g = W[i, 4 * j + k], gradient[i, 4 * j + k]
                G[i, j] += g * (w.sign() if rule == "autoprune" else w)
    if rule != "adaptive":
        G /= 2  # the root of the number of weights per block
    g0 = G / G.square().mean().sqrt() + mu
    step = g0 / g0.abs() if rule == "adaptive" else g0  # after one update v is g₀², which leaves the sign
    torch.testing.assert_close(aux.M[0], before - 0.1 * step)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.05, 1))
def test_blocks_are_pruned_whole_and_the_density_is_not_exceeded(seed, density):
    aux = AuxiliaryParameters(make_weights(seed), granularity=Blocks())
    aux.meet(density)
    kept = sum(int(w.count_nonzero()) for w in aux.weights.values())
    assert kept == sum(aux.kept)
    assert density - 8 / aux.total - 0.01 < aux.density <= density + 1e-9
    for name, mask in zip(aux.weights, aux.masks(), strict=True):
        rows = mask.view(SHAPES[name][0], -1)
        for block in torch.split(rows, 4, dim=1):
            assert torch.equal(block.all(1), block.any(1)), name


def test_two_of_four_keeps_at_most_two_and_pruned_weights_come_back():
    layer = torch.randn(16, 32)
    before = layer.clone()
    aux = AuxiliaryParameters({"layer": layer}, granularity=TwoOfFour())
    assert int((layer.view(-1, 4) != 0).sum(1).max()) == 2
    first = aux.masks()[0]
    take_steps(aux, range(30), lr=0.02, mu=0.0)
    last = aux.masks()[0]
    assert int(last.view(-1, 4).sum(1).max()) == 2
    assert (last & ~first).any()
    assert torch.equal(layer[last], before[last])
    aux.meet(0.25)
    assert 0.24 < aux.density <= 0.25


@pytest.mark.parametrize("make", [Blocks, TwoOfFour, WeightGranularity])
@pytest.mark.parametrize("final", [False, True])
def test_state_is_restored_exactly_and_later_steps_are_equal(make, final):
    chosen = {name: w for name, w in make_weights().items() if make is not TwoOfFour or w.numel() % 4 == 0}
    aux = AuxiliaryParameters(chosen, granularity=make())
    take_steps(aux, range(5))
    if final:
        aux.finalize_masks()
    file = io.BytesIO()
    torch.save(aux.state_dict(), file)
    file.seek(0)
    copies = {name: w.clone() for name, w in aux.weights.items()}
    restored = AuxiliaryParameters(copies, granularity=make(), initial_m=None)
    for name, weight in copies.items():
        weight.copy_(aux.weights[name])
    restored.load_state_dict(torch.load(file, weights_only=True))
    if not final:
        for each in (aux, restored):
            take_steps(each, range(5, 9))
    assert same(restored.state_dict(), aux.state_dict())
    assert same(list(restored.weights.values()), list(aux.weights.values()))


@pytest.mark.parametrize("rule", ["adaptive", "vanilla"])
def test_joined_layers_equal_layers_that_were_created_together(rule):
    together = AuxiliaryParameters(make_weights(), granularity=Blocks(), update_rule=rule)
    alone = {name: make_weights()[name] for name in ("wide", "large")}
    joined = AuxiliaryParameters(alone, granularity=Blocks(), update_rule=rule)
    later = {name: w for name, w in make_weights().items() if name not in alone}
    joined.join(AuxiliaryParameters(later, granularity=Blocks(), update_rule=rule), list(SHAPES))
    for aux in (together, joined):
        take_steps(aux, range(3))
        torch.manual_seed(0)
        assert aux.step([torch.randn(shape) if name != "wide" else None for name, shape in SHAPES.items()], 0.1, 0.5)
        aux.update_masks()
    for actual, expected in zip(joined.M, together.M, strict=True):
        torch.testing.assert_close(actual, expected)
    assert joined.kept == together.kept


def test_every_layer_keeps_its_floor_of_units():
    aux = AuxiliaryParameters(make_weights(), granularity=Blocks(), layer_floor=0.1)
    take_steps(aux, range(3), lr=10, mu=100)
    units = [SHAPES[name][0] * math.ceil(math.prod(SHAPES[name][1:]) / 4) for name in SHAPES]
    assert aux.floors == [max(1, math.ceil(0.1 * n)) for n in units]
    assert [int((M > 0).sum()) for M in aux.M] == aux.floors


def test_the_state_of_another_granularity_is_refused():
    state = AuxiliaryParameters(make_weights(), granularity=Blocks()).state_dict()
    with pytest.raises(AutoPruneError, match='run pruned blocks, and this callback has `granularity="weight"`: resume'):
        AuxiliaryParameters(make_weights()).load_state_dict(state)


def test_keep_is_refused_unless_single_weights_are_pruned():
    with pytest.raises(
        AutoPruneError, match=r'`keep` counts single weights, and the granularity is "block": use `meet'
    ):
        AuxiliaryParameters(make_weights(), granularity=Blocks()).keep(10)


def test_a_step_leaves_the_given_gradients_unchanged():
    class Plain(UPDATE_RULES["vanilla"]):
        def sensitivity(self, dL_dT, W):
            return dL_dT  # the user's tensor itself, not a copy

    for granularity in (Blocks(), WeightGranularity()):
        aux = AuxiliaryParameters(make_weights(), granularity=granularity, update_rule=Plain())
        gradients = [torch.randn(shape) for shape in SHAPES.values()]
        before = copy.deepcopy(gradients)
        aux.step(gradients, 0.1, 0.5)
        assert same(gradients, before)


def test_a_registered_granularity_can_be_chosen_in_the_settings(monkeypatch):
    from lightning_autoprune import Pruner, Settings
    from lightning_autoprune.method import granularity

    monkeypatch.setitem(granularity.GRANULARITIES, "block", Blocks)  # stands for one line in the registry
    assert GRANULARITIES["block"] is Blocks
    layer = torch.nn.Linear(32, 32)
    pruner = Pruner({"layer": layer.weight}, Settings(granularity="block", target_sparsity=0.75, warmup=0), 40)
    pruner.start()
    for _ in range(40):
        if pruner.due:
            pruner.auxiliary_step([torch.randn(32, 32)])
        pruner.end_step()
    assert pruner.masks_final
    assert pruner.sparsity == 0.75
    assert torch.equal((layer.weight.view(-1, 4) != 0).all(1), (layer.weight.view(-1, 4) != 0).any(1))


def test_rows_that_are_cut_by_sharding_are_refused_by_name():
    weight = SimpleNamespace(device_mesh="mesh", placements=(Shard(1),))
    with pytest.raises(
        AutoPruneError, match=r"Layer 'a' is sharded as S.1., and the granularity 'block' needs whole rows: shard it"
    ):
        Blocks().check_sharding({"a": weight})
    weight.placements = (Shard(0),)
    Blocks().check_sharding({"a": weight, "b": torch.ones(2, 2)})
    WeightGranularity().check_sharding({"a": SimpleNamespace(device_mesh="mesh", placements=(Shard(1),))})


def test_a_density_below_what_the_largest_units_need_is_refused():
    class Rows(Blocks):
        name = "row"

        def unit_shape(self, shape):
            return (shape[0], 1)

        def sum_units(self, x):
            return x.reshape(len(x), 1, -1).sum(-1)

        def spread(self, units, shape):
            return units.expand(tuple(shape))

    layers = {"wide": torch.randn(2, 50), "narrow": torch.randn(20, 1)}
    message = (
        "Keeping 0.2 of the weights is not possible with the granularity 'row': with `layer_floor=0.001` the 2 layers"
    )
    with pytest.raises(AutoPruneError, match=message + " keep 2 units, up to 0.425 of the weights"):
        Rows().check_density(layers, 0.2, 0.001)
    Rows().check_density(layers, 0.425, 0.001)
    aux = AuxiliaryParameters(layers, granularity=Rows())
    aux.meet(0.425)
    assert aux.density <= 0.425


def test_a_rule_may_return_sensitivities_of_another_precision():
    class Double(UPDATE_RULES["adaptive"]):
        def sensitivity(self, dL_dT, W):
            return super().sensitivity(dL_dT.double(), W.double())

    for granularity in (Blocks(), WeightGranularity()):
        aux = AuxiliaryParameters(make_weights(), granularity=granularity, update_rule=Double())
        take_steps(aux, range(3))
        assert all(M.dtype == torch.float32 for M in aux.M)
