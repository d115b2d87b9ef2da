"""Random numbers that do not touch the user's, and seeds that are derived from several integers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.tensors.random_state import derive_seed, isolated_random


def test_random_numbers_after_the_block_are_the_same_as_without_it():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with isolated_random(5):
        draw()
    assert draw() == expected


def test_random_numbers_inside_the_block_depend_on_the_seeds_alone():
    def inside(*seeds):
        with isolated_random(*seeds):
            return torch.rand(1).item(), np.random.rand(), random.random()

    assert inside(1, 2) == inside(1, 2)
    assert len({inside(1, 2), inside(2, 1), inside(1), inside(12)}) == 4


def test_random_states_are_restored_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), isolated_random(1):
        torch.rand(1 // (state.numel() - state.numel()))
    assert torch.equal(torch.get_rng_state(), state)


@given(st.lists(st.integers(-(2**63), 2**64), max_size=3))
def test_a_derived_seed_fits_into_63_bits(seeds):
    assert 0 <= derive_seed(*seeds) < 2**63
