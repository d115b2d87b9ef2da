"""The path of the density to a target: named and custom schedules."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_autoprune import AutoPruneError, Pruner, Settings
from lightning_autoprune.method.schedule import SCHEDULES, Phases, make_schedule, steps_advised, target_path

targets = st.floats(0.001, 1)


def test_phases_cover_the_run():
    assert Phases.of(38, 5 / 38, 13 / 38) == Phases(5, 25, 38)
    assert Phases.of(10, 0.0, 0.0) == Phases(0, 10, 10)
    assert Phases.of(1, 0.13, 0.34) == Phases(0, 1, 1)


@given(st.sampled_from(list(SCHEDULES)), targets)
def test_every_named_schedule_falls_from_1_to_its_target_and_stays(name, target):
    path = [SCHEDULES[name](i / 100, 1.0, target) for i in range(101)]
    assert path[0] == pytest.approx(1)
    assert path[90:] == [pytest.approx(target)] * 11
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(path))


def test_named_schedules_are_powers_of_the_remaining_time():
    assert SCHEDULES["linear"](0.45, 1, 0.1) == pytest.approx(0.1 + 0.9 * 0.5)
    assert SCHEDULES["cubic"](0.45, 1, 0.1) == pytest.approx(0.1 + 0.9 * 0.5**3)
    assert SCHEDULES["polynomial"](0.45 * 0.9, 1, 0.1) == pytest.approx(0.2)


@given(targets, targets)
def test_the_target_path_falls_from_start_to_target_and_stays(a, b):
    start, target = max(a, b), min(a, b)
    path = [target_path(i / 100, start, target) for i in range(101)]
    assert path[0] == pytest.approx(start)
    assert path[90:] == [pytest.approx(target)] * 11
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(path))


@given(st.floats(1e-4, 0.35))
def test_the_density_is_twice_the_target_after_45_percent_of_the_path(target):
    assert target_path(0.45 * 0.9, 1, target) == pytest.approx(2 * target)


def test_the_path_to_a_high_density_is_linear():
    assert [target_path(i / 4, 1, 0.6, share=1) for i in range(5)] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_a_power_of_3_gives_the_path_of_zhu_and_gupta():
    assert target_path(0.25, 1, 0.1, share=1, power=3) == pytest.approx(0.1 + 0.9 * 0.75**3)


def test_progress_outside_the_phase_is_clamped():
    assert target_path(-1, 1, 0.1) == 1
    assert target_path(2, 1, 0.1) == 0.1


def drop_halfway(progress: float, start: float, target: float) -> float:
    return start if progress < 0.5 else target


def record_densities(schedule) -> list[float]:
    """Return the density after each of 99 pruning steps with random gradients."""
    torch.manual_seed(0)
    layer = nn.Parameter(torch.randn(40, 50))
    pruner = Pruner({"layer": layer}, Settings(target_sparsity=0.9, schedule=schedule, warmup=0, finetune=0), 100)
    pruner.start()
    densities = []
    for _ in range(99):
        pruner.auxiliary_step([torch.randn(40, 50)])
        pruner.end_step()
        densities.append(1 - pruner.sparsity)
    return densities


def test_a_custom_schedule_is_followed():
    custom, default = record_densities(drop_halfway), record_densities("polynomial")
    assert custom[45] > default[45] + 0.2  # before the drop
    assert custom != default
    assert record_densities(partial(target_path)) == default


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            lambda progress, start, target: 1.5,
            r"returned 1.5 at progress 0 for a target density of 0.5; it must",
        ),
        (lambda progress, start, target: 1 - progress, r"returned 0.0 at progress 1 for a target density"),
        (lambda progress, start, target: None, r"returned None at progress 0"),
        (3, r"`schedule` is 3; allowed are 'polynomial', 'cubic', 'linear', or a function of progress, first density"),
    ],
    ids=["above 1", "reaches 0", "None", "not a function"],
)
def test_a_schedule_that_does_not_return_densities_is_refused(schedule, message):
    with pytest.raises(AutoPruneError, match=message):
        Settings(target_sparsity=0.5, schedule=schedule)


def test_a_schedule_name_gives_its_function():
    assert make_schedule("polynomial") is target_path


def test_higher_targets_need_longer_runs():
    advised = [steps_advised(1 - target) for target in (0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 0.998)]
    assert advised == sorted(advised)
    assert (advised[0], advised[-1]) == (4, 20_000)
