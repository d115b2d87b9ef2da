from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.pressure_controller import PressureController
from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.method.update_rules import GradientScale


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


@given(st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_too_dense_raises_the_pressure_and_too_sparse_lowers_it(density, path):
    controller = PressureController(0.3)
    first = controller.update(density, path)
    again = controller.update(density, path)  # the error lasts
    for before, after in ((0.3, first), (first, again)):
        assert (after > before) == (density > path) or density == pytest.approx(path)
    assert 0.3 / 2.86 < first < 0.3 * 2.86


def test_the_pressure_never_has_far_to_climb():
    controller = PressureController(0.3)
    for _ in range(1000):
        controller.update(0.1, 0.9)
    assert controller.mu == 0.003


def test_the_pressure_does_not_grow_without_end_and_comes_back():
    controller = PressureController(0.05)
    for _ in range(5000):
        controller.update(0.9, 0.1)
    assert controller.mu == 1e15
    assert controller.update(0.09, 0.1) < 1e15


def test_an_error_that_shrinks_lowers_the_pressure_before_the_path_is_crossed():
    controller = PressureController(0.3)
    high = controller.update(0.6, 0.5)
    assert controller.update(0.51, 0.5) < high


def swings(response: float) -> tuple[float, float]:
    """Largest distance from the path, and the distance at the end, for weights that leave at a rate of μ."""
    controller, density, distances = PressureController(0.05, response=response), 1.0, []
    for step in range(400):
        density = min(1.0, max(1e-3, density * (1 - 0.2 * controller.mu) + 0.002 * (1 - density)))
        path = target_path(step / 400, 1.0, 0.05)
        controller.update(density, path)
        distances.append(abs(density / path - 1))
    return max(distances), distances[-1]


def test_the_controller_keeps_a_simple_process_close_to_its_path():
    largest, last = swings(response=10)
    assert largest < 0.1
    assert last < 0.01


def test_an_error_that_lasts_is_ended_even_where_it_swings():
    """The density of a small layer whose gradients are noisy jumps by more than a tenth from step to step."""
    controller = PressureController(0.1)
    for step in range(200):
        controller.update(0.19 if step % 2 else 0.22, path=0.1)
    assert controller.mu > 100 * 0.1


def test_without_the_response_it_swings():
    assert swings(response=0)[0] > 2 * swings(response=10)[0]
