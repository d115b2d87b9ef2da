"""Weights that are taken in by others' auxiliary parameters, as of layers that are thawed."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import same

from lightning_autoprune.method.auxiliary import AuxiliaryParameters

SHAPES = {"a": (20, 30), "b": (7,), "c": (200, 100), "d": (4, 4, 3, 3), "e": (150, 150), "f": (9, 9)}


def many(names, **options) -> AuxiliaryParameters:
    """Weights of those names, the same whenever they are made, in double precision."""
    generators = {name: torch.Generator().manual_seed(ord(name)) for name in names}
    weights = {n: torch.randn(SHAPES[n], generator=generators[n], dtype=torch.float64) for n in names}
    if "d" in weights:
        weights["d"] = weights["d"].to(memory_format=torch.channels_last)
    return AuxiliaryParameters(weights, layer_floor=0.05, **options)


def take_steps(aux: AuxiliaryParameters, numbers, trained=SHAPES) -> None:
    for number in numbers:
        gradients = []
        for name in aux.weights:
            generator = torch.Generator().manual_seed(1000 * number + ord(name))
            gradient = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
            gradients.append(gradient if name in trained else None)
        before = copy.deepcopy(gradients)
        assert aux.step(gradients, 0.02, 0.4)
        assert same(gradients, before)  # they are the user's own
        aux.update_masks()


@pytest.mark.parametrize("rule", ["adaptive", "autoprune"])
@pytest.mark.parametrize(("first", "names"), [("dbca", "aebfcd"), ("ef", "fabcde"), ("cb", "cabedf")])
def test_joining_weights_is_as_if_they_had_been_there_and_not_trained(first, names, rule):
    joined = many(first, update_rule=rule)
    take_steps(joined, range(8))
    joined.join(many([name for name in names if name not in first], update_rule=rule), list(names))
    whole = many(names, update_rule=rule)
    take_steps(whole, range(8), trained=first)
    for aux in (joined, whole):
        take_steps(aux, range(8, 12))
        take_steps(aux, range(12, 15), trained=names[:3])
        take_steps(aux, range(15, 18))
    assert list(joined.weights) == list(names)
    assert (joined.kept, joined.totals, joined.floors) == (whole.kept, whole.totals, whole.floors)
    assert min(joined.kept) < max(joined.kept)
    for ours, others in zip(joined._entries(), whole._entries(), strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-9, atol=1e-12)

    def updates(aux: AuxiliaryParameters) -> dict[str, int]:
        pairs = zip(aux.buckets, aux.updates, strict=True)
        return {names[i]: count for bucket, count in pairs for i in bucket.numbers}

    assert updates(joined) == updates(whole)
    restored = many(names, update_rule=rule, initial_m="constant")
    for weight, other in zip(restored.weights.values(), joined.weights.values(), strict=True):
        weight.copy_(other)
    restored.load_state_dict(joined.state_dict())
    for aux in (restored, joined):
        take_steps(aux, range(18, 22))
    assert same(restored._entries(), joined._entries())
