"""What has an m, composed with every rule: units within a layer, by classes that the package does not have."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from granularities import Blocks, TwoOfFour
from helpers import same
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_autoprune import AutoPruneError, AuxiliaryParameters
from lightning_autoprune.method.granularity import GRANULARITIES, WeightGranularity
from lightning_autoprune.method.update_rules import UPDATE_RULES

SHAPES = {"wide": (6, 16), "ragged": (5, 10), "conv": (3, 2, 2, 2), "large": (200, 120)}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def take_steps(aux: AuxiliaryParameters, seeds, lr: float = 0.05, mu: float = 0.5) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        assert aux.step([torch.randn(w.shape, generator=generator) for w in aux.weights.values()], lr, mu)
        aux.update_masks()


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_step_of_blocks_is_that_of_the_sums_over_each_block(rule):
    """The slow way, block by block."""
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
        G /= 2  # the root of four weights
    g0 = G / G.square().mean().sqrt() + mu
    step = g0 / g0.abs() if rule == "adaptive" else g0  # the first step of a running mean square is a sign
    torch.testing.assert_close(aux.M[0], before - 0.1 * step)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(0.05, 1))
def test_weights_of_a_block_are_pruned_together_and_the_density_is_not_exceeded(seed, density):
    aux = AuxiliaryParameters(weights(seed), granularity=Blocks())
    aux.meet(density)
    kept = sum(int(w.count_nonzero()) for w in aux.weights.values())
    assert kept == sum(aux.kept)
    assert density - 8 / aux.total - 0.01 < aux.density <= density + 1e-9
    for name, mask in zip(aux.weights, aux.masks(), strict=True):
        rows = mask.view(SHAPES[name][0], -1)
        for block in torch.split(rows, 4, dim=1):
            assert torch.equal(block.all(1), block.any(1)), name


def test_two_of_four_never_keeps_more_and_its_pruned_weights_come_back():
    layer = torch.randn(16, 32)
    before = layer.clone()
    aux = AuxiliaryParameters({"layer": layer}, granularity=TwoOfFour())
    assert int((layer.view(-1, 4) != 0).sum(1).max()) == 2
    first = aux.masks()[0]
    take_steps(aux, range(30), lr=0.02, mu=0.0)
    now = aux.masks()[0]
    assert int(now.view(-1, 4).sum(1).max()) == 2
    assert (now & ~first).any()
    assert torch.equal(layer[now], before[now])
    aux.meet(0.25)
    assert 0.24 < aux.density <= 0.25


@pytest.mark.parametrize("make", [Blocks, TwoOfFour, WeightGranularity])
@pytest.mark.parametrize("final", [False, True])
def test_state_is_restored_exactly_and_every_later_step_is_the_same(make, final):
    shapes = {name: w for name, w in weights().items() if make is not TwoOfFour or w.numel() % 4 == 0}
    aux = AuxiliaryParameters(shapes, granularity=make())
    take_steps(aux, range(5))
    if final:
        aux.finalize_masks()
    file = io.BytesIO()
    torch.save(aux.state_dict(), file)
    file.seek(0)
    others = {name: w.clone() for name, w in aux.weights.items()}
    restored = AuxiliaryParameters(others, granularity=make(), initial_m="constant")
    for name, weight in others.items():
        weight.copy_(aux.weights[name])
    restored.load_state_dict(torch.load(file, weights_only=True))
    if not final:
        for each in (aux, restored):
            take_steps(each, range(5, 9))
    assert same(restored.state_dict(), aux.state_dict())
    assert same(list(restored.weights.values()), list(aux.weights.values()))


@pytest.mark.parametrize("rule", ["adaptive", "vanilla"])
def test_layers_of_units_can_be_joined_and_trained_apart(rule):
    both = AuxiliaryParameters(weights(), granularity=Blocks(), update_rule=rule)
    alone = {name: weights()[name] for name in ("wide", "large")}
    joined = AuxiliaryParameters(alone, granularity=Blocks(), update_rule=rule)
    later = {name: w for name, w in weights().items() if name not in alone}
    joined.join(AuxiliaryParameters(later, granularity=Blocks(), update_rule=rule), list(SHAPES))
    for aux in (both, joined):
        take_steps(aux, range(3))
        torch.manual_seed(0)
        assert aux.step([torch.randn(shape) if name != "wide" else None for name, shape in SHAPES.items()], 0.1, 0.5)
        aux.update_masks()
    for ours, others in zip(joined.M, both.M, strict=True):
        torch.testing.assert_close(ours, others)
    assert joined.kept == both.kept


def test_each_layer_keeps_its_floor_of_units():
    aux = AuxiliaryParameters(weights(), granularity=Blocks(), layer_floor=0.1)
    take_steps(aux, range(3), lr=10, mu=100)
    units = [SHAPES[name][0] * math.ceil(math.prod(SHAPES[name][1:]) / 4) for name in SHAPES]
    assert aux.floors == [max(1, math.ceil(0.1 * n)) for n in units]
    assert [int((M > 0).sum()) for M in aux.M] == aux.floors


def test_the_state_of_another_granularity_is_refused_by_name():
    state = AuxiliaryParameters(weights(), granularity=Blocks()).state_dict()
    with pytest.raises(AutoPruneError, match='run pruned blocks, and this callback has `granularity="weight"`: resume'):
        AuxiliaryParameters(weights()).load_state_dict(state)


def test_counting_single_weights_is_refused_for_other_granularities():
    with pytest.raises(
        AutoPruneError, match=r'`keep` counts single weights, and the granularity is "block": use `meet'
    ):
        AuxiliaryParameters(weights(), granularity=Blocks()).keep(10)


def test_the_gradients_given_to_a_step_are_left_unchanged():
    class Plain(UPDATE_RULES["vanilla"]):
        def sensitivity(self, dL_dT, W):
            return dL_dT  # the user's own tensor

    for granularity in (Blocks(), WeightGranularity()):
        aux = AuxiliaryParameters(weights(), granularity=granularity, update_rule=Plain())
        gradients = [torch.randn(shape) for shape in SHAPES.values()]
        before = copy.deepcopy(gradients)
        aux.step(gradients, 0.1, 0.5)
        assert same(gradients, before)


def test_a_new_granularity_runs_from_the_settings_once_it_is_registered(monkeypatch):
    from lightning_autoprune import Pruner, Settings
    from lightning_autoprune.method import granularity

    monkeypatch.setitem(granularity.GRANULARITIES, "block", Blocks)  # as one line in the registry would
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
