"""Generators that the user's objects keep draw the same numbers after the block as without it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from lightning_autoprune.tensors.generators import preserve_generators


class Noise:
    def __init__(self, generator) -> None:
        self.generator = generator


class Failing(Noise):
    def fail(self):
        raise KeyError


class Transformed:
    def __init__(self, *transforms) -> None:
        self.transforms, self.owner = list(transforms), self  # a reference to itself must not matter


def draw(generator) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random())


@pytest.mark.parametrize(
    "make",
    [
        lambda: random.Random(0),
        lambda: np.random.default_rng(0),
        lambda: np.random.RandomState(0),
        lambda: torch.Generator().manual_seed(0),
    ],
    ids=["python", "numpy", "legacy numpy", "torch"],
)
def test_a_generator_in_a_transform_of_a_subset_is_restored(make):
    generator, alone = make(), make()
    with preserve_generators(Subset(Transformed(Noise(generator)), [0])):
        draw(generator)
    assert draw(generator) == draw(alone)


def test_the_state_is_restored_after_an_error():
    def fail(owner):
        with preserve_generators(owner.fail):
            draw(owner.generator)
            owner.fail()

    owner = Failing(random.Random(0))
    with pytest.raises(KeyError):
        fail(owner)
    assert draw(owner.generator) == random.Random(0).random()
