from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.pressure import GradientScale, PressureController, target_path

fractions = st.floats(0.001, 1)


@given(st.floats(1e-6, 1e6), st.integers(1, 50))
def test_the_scale_of_a_constant_is_its_root_from_the_first_update(mean_square, updates):
    scale = GradientScale()
    for _ in range(updates):
        value = scale.update(mean_square)
    assert value == pytest.approx(mean_square**0.5)


def test_the_scale_follows_a_change_slowly():
    scale = GradientScale(decay=0.9)
    for _ in range(100):
        scale.update(1.0)
    assert 1 < scale.update(4.0) < 1.2


@given(fractions, fractions)
def test_the_path_falls_from_start_to_target_and_stays(a, b):
    start, target = max(a, b), min(a, b)
    path = [target_path(i / 100, start, target) for i in range(101)]
    assert path[0] == pytest.approx(start)
    assert path[90:] == [pytest.approx(target)] * 11
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(path))


def test_progress_outside_the_phase_is_clamped():
    assert target_path(-1, 1, 0.1) == 1
    assert target_path(2, 1, 0.1) == 0.1


@given(st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_too_dense_raises_the_pressure_and_too_sparse_lowers_it(density, path):
    mu = PressureController(0.3).update(density, path)
    assert (mu > 0.3) == (density > path) or density == pytest.approx(path)
    assert 0.3 * 0.95 < mu < 0.3 * 1.06


def test_the_controller_brings_a_simple_process_to_its_path():
    """Weights leave at a rate proportional to μ and come back at a constant one."""
    controller, density = PressureController(0.05), 1.0
    for step in range(4000):
        density = min(1.0, max(1e-3, density * (1 - 0.02 * controller.mu) + 0.0002 * (1 - density)))
        controller.update(density, target_path(step / 4000, 1.0, 0.05))
    assert density == pytest.approx(0.05, rel=0.05)
