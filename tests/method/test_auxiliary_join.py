"""Merging one instance of ``AuxiliaryParameters`` into another, as for layers that are unfrozen during a run."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import same

from lightning_autoprune.method.auxiliary import AuxiliaryParameters

SHAPES = {"a": (20, 30), "b": (7,), "c": (200, 100), "d": (4, 4, 3, 3), "e": (150, 150), "f": (9, 9)}


def make_auxiliary(names, **options) -> AuxiliaryParameters:
    """Return auxiliary parameters of float64 weights; a name gives the same weight in every call."""
    generators = {name: torch.Generator().manual_seed(ord(name)) for name in names}
    weights = {n: torch.randn(SHAPES[n], generator=generators[n], dtype=torch.float64) for n in names}
    if "d" in weights:
        weights["d"] = weights["d"].to(memory_format=torch.channels_last)
    return AuxiliaryParameters(weights, **{"layer_floor": 0.05, "initial_m": "magnitude", **options})


def take_steps(aux: AuxiliaryParameters, seeds, trained=SHAPES) -> None:
    for seed in seeds:
        gradients = []
        for name in aux.weights:
            generator = torch.Generator().manual_seed(1000 * seed + ord(name))
            gradient = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            gradients.append(gradient if name in trained else None)
        before = copy.deepcopy(gradients)
        assert aux.step(gradients, 0.02, 0.4)
        assert same(gradients, before)  # the gradients belong to the user
        aux.update_masks()


@pytest.mark.parametrize("rule", ["adaptive", "autoprune"])
@pytest.mark.parametrize(("initial_names", "names"), [("dbca", "aebfcd"), ("ef", "fabcde"), ("cb", "cabedf")])
def test_joined_weights_equal_weights_that_were_present_but_untrained(initial_names, names, rule):
    joined = make_auxiliary(initial_names, update_rule=rule)
    take_steps(joined, range(8))
    joined.join(make_auxiliary([name for name in names if name not in initial_names], update_rule=rule), list(names))
    expected = make_auxiliary(names, update_rule=rule)
    take_steps(expected, range(8), trained=initial_names)
    for aux in (joined, expected):
        take_steps(aux, range(8, 12))
        take_steps(aux, range(12, 15), trained=names[:3])
        take_steps(aux, range(15, 18))
    assert list(joined.weights) == list(names)
    assert (joined.kept, joined.totals, joined.floors) == (expected.kept, expected.totals, expected.floors)
    assert min(joined.kept) < max(joined.kept)
    for actual, wanted in zip(joined._entries(), expected._entries(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)

    def updates_by_name(aux: AuxiliaryParameters) -> dict[str, int]:
        pairs = zip(aux.buckets, aux.updates, strict=True)
        return {names[i]: count for bucket, count in pairs for i in bucket.numbers}

    assert updates_by_name(joined) == updates_by_name(expected)
    restored = make_auxiliary(names, update_rule=rule, initial_m=None)
    for weight, joined_weight in zip(restored.weights.values(), joined.weights.values(), strict=True):
        weight.copy_(joined_weight)
    restored.load_state_dict(joined.state_dict())
    for aux in (restored, joined):
        take_steps(aux, range(18, 22))
    assert same(restored._entries(), joined._entries())
