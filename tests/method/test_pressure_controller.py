"""The controller that moves the pressure so that the density follows a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.pressure_controller import PressureController
from lightning_autoprune.method.schedule import target_path


@given(st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_pressure_rises_if_too_dense_and_falls_if_too_sparse(density, path):
    controller = PressureController(0.3)
    first = controller.update(density, path)
    again = controller.update(density, path)  # the error is unchanged
    for before, after in ((0.3, first), (first, again)):
        assert (after > before) == (density > path) or density == pytest.approx(path)
    assert 0.3 / 2.86 < first < 0.3 * 2.86


def test_pressure_stays_above_a_hundredth_of_its_first_value():
    controller = PressureController(0.3)
    for _ in range(1000):
        controller.update(0.1, 0.9)
    assert controller.mu == 0.003


def test_pressure_has_an_upper_limit_and_falls_again():
    controller = PressureController(0.05)
    for _ in range(5000):
        controller.update(0.9, 0.1)
    assert controller.mu == 1e15
    assert controller.update(0.09, 0.1) < 1e15


def test_a_shrinking_error_lowers_the_pressure_before_the_path_is_crossed():
    controller = PressureController(0.3)
    high = controller.update(0.6, 0.5)
    assert controller.update(0.51, 0.5) < high


def measure_swings(response: float) -> tuple[float, float]:
    """Return the largest and the last distance from the path, for weights that are pruned at a rate of μ."""
    controller, density, distances = PressureController(0.05, response=response), 1.0, []
    for step in range(400):
        density = min(1.0, max(1e-3, density * (1 - 0.2 * controller.mu) + 0.002 * (1 - density)))
        path = target_path(step / 400, 1.0, 0.05)
        controller.update(density, path)
        distances.append(abs(density / path - 1))
    return max(distances), distances[-1]


def test_the_controller_keeps_a_simple_process_close_to_its_path():
    largest, last = measure_swings(response=10)
    assert largest < 0.1
    assert last < 0.01


def test_pressure_rises_on_a_lasting_error_that_swings():
    """The density of a small layer whose gradients are noisy jumps by more than a tenth from step to step."""
    controller = PressureController(0.1)
    for step in range(200):
        controller.update(0.19 if step % 2 else 0.22, path=0.1)
    assert controller.mu > 100 * 0.1


def test_without_the_response_term_the_density_swings():
    assert measure_swings(response=0)[0] > 2 * measure_swings(response=10)[0]
