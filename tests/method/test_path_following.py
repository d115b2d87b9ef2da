"""Following the path of the density to the target."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.method.path_following import PathFollower
from lightning_autoprune.method.settings import Settings


def make_auxiliary(**settings):
    torch.manual_seed(0)
    return AuxiliaryParameters({"a": torch.randn(100, 50), "b": torch.randn(500)}, layer_floor=0, **settings)


def concatenate(auxiliary):
    return torch.cat([M.flatten() for M in auxiliary.M])


@given(progress=st.floats(0, 1), target=st.floats(0.01, 0.99), steps=st.integers(1, 10_000))
def test_the_density_is_on_its_path_whatever_m_is(progress, target, steps):
    auxiliary, follower = make_auxiliary(), PathFollower(Settings(target_sparsity=target))
    follower.follow(auxiliary, [0, 1], progress, steps)
    assert math.log(auxiliary.density / follower.path_density(progress)) == pytest.approx(0, abs=0.021)


def test_in_a_long_run_the_threshold_leaves_m_to_the_pressure():
    auxiliary, follower = make_auxiliary(), PathFollower(Settings(target_sparsity=0.9))
    before = concatenate(auxiliary)
    follower.follow(auxiliary, [0, 1], 0.5, steps=10_000)
    torch.testing.assert_close(concatenate(auxiliary), before, rtol=0, atol=1e-5)
    assert int((before > 0).sum()) > 5 * sum(auxiliary.kept)


@pytest.mark.parametrize(("steps", "share"), [(20, 1.0), (40, 1.0), (80, 0.25)])
def test_in_a_short_run_m_moves_by_a_share_of_the_threshold(steps, share):
    moved, whole = make_auxiliary(), make_auxiliary()
    before = concatenate(moved)
    PathFollower(Settings(target_sparsity=0.9)).follow(moved, [0, 1], 0.5, steps)
    PathFollower(Settings(target_sparsity=0.9)).follow(whole, [0, 1], 0.5, steps=1)
    torch.testing.assert_close(concatenate(moved) - before, share * (concatenate(whole) - before), rtol=1e-3, atol=1e-6)


def test_a_density_near_its_path_moves_the_pressure_alone():
    auxiliary, follower = make_auxiliary(), PathFollower(Settings(target_sparsity=0.9))
    auxiliary.keep(round(1.01 * follower.path_density(0.5) * auxiliary.total))
    before, masks, mu = concatenate(auxiliary), auxiliary.masks(), follower.mu
    follower.follow(auxiliary, [0, 1], 0.5, steps=1)
    assert torch.equal(concatenate(auxiliary), before)
    assert all(torch.equal(a, b) for a, b in zip(auxiliary.masks(), masks, strict=True))
    assert follower.mu > mu


def test_the_pressure_answers_to_the_density_before_the_threshold():
    auxiliary, follower = make_auxiliary(), PathFollower(Settings(target_sparsity=0.9))
    pressures = []
    for _ in range(3):
        auxiliary.update_masks()
        follower.follow(auxiliary, [0, 1], 0.5, steps=10_000)
        pressures.append(follower.mu)
    assert pressures[0] < pressures[1] < pressures[2]


def test_only_the_layers_whose_m_was_stepped_are_brought_to_the_path():
    auxiliary, follower = make_auxiliary(), PathFollower(Settings(target_sparsity=0.9))
    follower.follow(auxiliary, [1], 0.5, steps=100)
    first, second = auxiliary.layer_sparsity().values()
    assert first == 0
    assert 1 - second == pytest.approx(follower.path_density(0.5), rel=0.01)


def test_the_path_never_asks_for_more_than_it_was_told_to_stay_below():
    follower = PathFollower(Settings(target_sparsity=0.9))
    follower.stay_below(0.3)
    assert follower.path_density(0.0) == 0.3
    assert follower.path_density(1.0) == pytest.approx(0.1)


def test_without_a_target_the_resumed_pressure_is_that_of_the_settings():
    follower = PathFollower(Settings(pressure=0.2))
    follower.load_state_dict({**PathFollower(Settings(pressure=0.1)).state_dict(), "first_density": 0.7})
    assert follower.mu == 0.2
    assert follower.first_density == 0.7
