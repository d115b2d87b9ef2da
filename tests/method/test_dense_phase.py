"""When pruning begins if the user leaves it to the training loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.dense_phase import FirstLosses, begins_early
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.settings import Settings


def make_losses(values, steps=None):
    losses = FirstLosses(steps or len(values))
    for step, value in enumerate(values):
        losses.add(step, torch.tensor(value))
    return losses


@pytest.mark.parametrize(
    ("first", "now", "early"),
    [
        (0.3, 0.28, True),  # trained already
        (0.3, 0.45, True),
        (2.3, 0.2, False),  # has learned
        (4.7, 2.6, False),  # still learns
        (1.0, 0.79, False),
        (1.0, 0.11, False),
        (0.0, 0.0, False),
        (-1.0, -1.0, False),
        (1.0, -5.0, False),
        (torch.nan, 1.0, False),
        (1.0, torch.nan, False),
        (1.0, torch.inf, False),
        (torch.inf, 1.0, False),
        (torch.inf, torch.inf, False),
    ],
)
def test_pruning_begins_early_if_the_loss_has_stayed(first, now, early):
    assert begins_early(first, now) == early


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(-10, 10))
def test_the_scale_of_the_loss_does_not_matter(first, now, exponent):
    assert begins_early(first, now) == begins_early(first * 2.0**exponent, now * 2.0**exponent)


def test_recent_losses_are_those_of_the_second_half():
    assert make_losses([8.0, 100.0, 1.0, 3.0]).means() == (8.0, 2.0)
    assert make_losses([8.0, 100.0, 1.0, 3.0, 5.0]).means() == (8.0, 3.0)


def test_batches_of_one_step_count_alike():
    losses = FirstLosses(2)
    for step, loss in [(0, 1.0), (0, 3.0), (1, 5.0), (1, 9.0)]:
        losses.add(step, torch.tensor(loss))
    assert losses.means() == (2.0, 7.0)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_nothing_is_known_without_losses_of_both(values):
    assert make_losses(values, steps=4).means() is None


def test_losses_are_resumed():
    whole, resumed = make_losses([3.0, 1.0, 0.1, 0.7]), FirstLosses(4)
    resumed.load_state_dict(make_losses([3.0, 1.0, 0.1], steps=4).state_dict())
    resumed.add(3, torch.tensor(0.7))
    assert resumed.means() == whole.means()


def run(losses, steps=100, **settings):
    pruner = Pruner({"layer": torch.ones(8)}, Settings(target_sparsity=0.5, **settings), steps)
    pruner.start()
    for loss in losses:
        pruner.add_loss(torch.tensor(loss))
        pruner.end_step()
    return pruner


@pytest.mark.parametrize(("loss", "start"), [(1.0, 10), (0.01, 25), (0.5, 25)])
def test_the_losses_of_the_first_tenth_decide_when_pruning_begins(loss, start):
    losses = [1.0] + [loss] * 30
    assert run(losses).phases.start == start
    assert run(losses[:start]).auxiliary is not None
    assert run(losses[: start - 1]).auxiliary is None


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.25, 0.3])
def test_losses_do_not_matter_if_the_user_sets_the_warmup(warmup):
    assert run([1.0] * 12, warmup=warmup).phases.start == round(100 * warmup)


def test_without_losses_a_quarter_is_dense():
    pruner = Pruner({"layer": torch.ones(8)}, Settings(target_sparsity=0.5), 100)
    pruner.start()
    for _ in range(24):
        pruner.end_step()
    assert pruner.auxiliary is None
    pruner.end_step()
    assert pruner.auxiliary is not None


@pytest.mark.parametrize("stop", [3, 9, 10, 15, 30])
@pytest.mark.parametrize("loss", [1.0, 0.5])
def test_a_resumed_run_begins_to_prune_when_the_run_that_never_stopped_does(stop, loss):
    stopped = run([1.0] + [loss] * (stop - 1))
    resumed = Pruner({"layer": torch.ones(8)}, stopped.settings, 100)
    resumed.load_state_dict(stopped.state_dict())
    resumed.start()
    for _ in range(stop, 40):
        resumed.add_loss(torch.tensor(loss))
        resumed.end_step()
    assert resumed.phases == run([1.0] + [loss] * 39).phases


@pytest.mark.parametrize("steps", [1, 5, 14])
def test_runs_too_short_to_tell_begin_after_a_quarter(steps):
    assert run([1.0] * steps, steps=steps).phases.start == round(steps / 4)


def resume(stopped, steps):
    pruner = Pruner({"layer": torch.ones(8)}, stopped.settings, steps)
    pruner.load_state_dict(stopped.state_dict())
    pruner.start()
    return pruner


@pytest.mark.parametrize(("loss", "start"), [(1.0, 20), (0.5, 50)])
def test_a_decision_holds_if_the_run_is_resumed_with_another_length(loss, start):
    assert resume(run([1.0] + [loss] * 11), 200).phases.start == start


def test_an_undecided_run_that_is_resumed_past_the_early_start_begins_late():
    resumed = resume(run([1.0] * 8), 50)  # whose early start is at 5
    assert resumed.phases.start == 12
    resumed.step = 11
    assert resumed.observes


def test_going_back_to_a_state_before_the_decision_takes_it_back():
    state, pruner = run([1.0] * 5).state_dict(), run([1.0] * 12)
    assert pruner.dense_phase.begins_early
    pruner.load_state_dict(state)
    assert pruner.dense_phase.begins_early is None
    for _ in range(5, 10):
        pruner.add_loss(torch.tensor(0.5))
        pruner.end_step()
    assert pruner.phases.start == 25


@pytest.mark.parametrize("every", [1, 2, 3])
def test_an_early_start_does_not_move_the_later_auxiliary_steps(every):
    early, late = run([1.0] * 20, mask_every_n_steps=every), run([1.0, *[0.5] * 19], mask_every_n_steps=every)
    assert early.dense_phase.begins_early
    assert not late.dense_phase.begins_early
    assert [early.is_due(step) for step in range(25, 65)] == [late.is_due(step) for step in range(25, 65)]
