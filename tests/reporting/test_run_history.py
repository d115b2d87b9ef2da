"""The history of a run stays short, survives a checkpoint, and agrees with the masks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from helpers import fit, loader, same
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.reporting.run_history import MetricPoint, RunHistory, compute_histogram, find_pareto_front


@given(st.integers(1, 2000))
def test_a_history_of_any_length_is_bounded_and_has_its_first_step(steps):
    history = RunHistory(["layer"])
    for step in range(steps):
        history.record_sparsity(step, [step / steps], step / steps)
    curve = history.curves["layer"]
    assert min(steps, 128) <= len(curve) <= 256
    assert curve[0] == (0, 0.0)
    gaps = {b - a for (a, _), (b, _) in pairwise(curve)}
    assert len(gaps) <= 1  # one interval throughout
    assert all(value == step / steps for step, value in curve)
    assert history.curves["all"] == curve


def test_a_step_marked_always_is_recorded():
    history = RunHistory(["layer"])
    for step in range(1000):
        history.record_sparsity(step, [0.0], 0.0)
    history.record_sparsity(1001, [0.9], 0.9, always=True)
    history.record_sparsity(1001, [0.1], 0.1, always=True)  # the same step again is ignored
    assert history.curves["layer"][-1] == (1001, 0.9)


@given(st.integers(1, 1500))
def test_the_last_validation_is_always_recorded(count):
    history = RunHistory()
    for step in range(count):
        history.record_metric("val_loss", step, 0.5, float(step))
    assert history.points[-1] == (count - 1, 0.5, float(count - 1))
    assert len(history.points) <= 257
    assert [step for step, _, _ in history.points] == sorted({step for step, _, _ in history.points})


def test_another_metric_starts_a_new_list_and_a_step_is_recorded_once():
    history = RunHistory()
    history.record_metric("val_loss", 3, 0.1, 2.0)
    history.record_metric("val_loss", 3, 0.1, 9.0)
    assert history.points == [(3, 0.1, 2.0)]
    history.record_metric("val_error", 4, 0.2, 1.0)
    assert (history.metric, history.points) == ("val_error", [(4, 0.2, 1.0)])


def test_the_best_point_with_final_masks_stays_even_if_earlier_points_were_better_and_sparser():
    history = RunHistory()
    for step in range(1000):
        value = 0.0 if step < 100 else 0.5 if step == 333 else 1.0
        history.record_metric("val_loss", step, 0.6 if step < 100 else 0.5, value, masks_final=step >= 100)
    assert (333, 0.5, 0.5) in history.points
    assert history.masks_final_at == 100
    assert RunHistory.from_state_dict(history.state_dict()).masks_final_at == 100


def test_a_restored_history_continues_like_the_original(tmp_path):
    history = RunHistory(["a", "b"])
    for step in range(700):
        history.record_sparsity(step, [step / 700, 0.1], 0.3)
    history.record_metric("val_loss", 5, 0.1, 2.0)
    history.record_histograms({"a": torch.randn(50), "b": torch.randn(50)})
    history.revived = [3, 4]
    torch.save(history.state_dict(), tmp_path / "state.pt")
    restored = RunHistory.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for h in (history, restored):
        h.record_sparsity(700, [1.0, 0.2], 0.4)
        h.record_sparsity(703, [1.0, 0.2], 0.4, always=True)
    assert same(history.state_dict(), restored.state_dict())
    assert restored.points == [(5, 0.1, 2.0)]


@given(st.lists(st.floats(-100, 100, width=32), min_size=1), st.integers(1, 60))
def test_a_histogram_counts_every_entry_on_its_side_of_zero(values, bins):
    counts, edges = compute_histogram(torch.tensor(values), bins)
    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1 <= bins + 3
    assert 0.0 in edges
    above = sum(n for n, left in zip(counts, edges, strict=False) if left >= 0)
    assert above == sum(value > 0 for value in values)  # m = 0 is pruned


def test_the_final_histogram_shows_as_many_weights_as_are_kept():
    torch.manual_seed(0)
    weight, history = nn.Parameter(torch.randn(50, 40)), RunHistory()
    pruner = Pruner({"layer": weight}, Settings(target_sparsity=0.9, mask_every_n_steps=20), total_steps=20)
    pruner.start()
    for _ in range(20):
        pruner.end_step(history.record_histograms)
    counts, edges = history.histograms["layer"]
    assert sum(n for n, left in zip(counts, edges, strict=False) if left >= 0) == weight.count_nonzero() == 200


def test_a_few_layers_have_histograms_including_the_first_and_the_last():
    history = RunHistory()
    history.record_histograms({f"layer{i}": torch.zeros(3) for i in range(50)})
    assert len(history.histograms) == 6
    assert history.histograms.keys() >= {"layer0", "layer49"}
    history.record_histograms({"only": torch.zeros(3)})
    assert history.histograms.keys() == {"only"}


def test_a_callback_ends_with_curves_a_metric_path_and_histograms():
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            seen[trainer.global_step] = callback.layer_sparsity()

    callback = AutoPruneCallback(target_sparsity=0.8)
    fit([callback, Watch()], val=loader(seed=3))
    curve = callback.curves["first"]
    assert [step for step, _ in curve] == sorted({*range(1, 32, 2), 20})  # each log, and when the masks became final
    assert all(value == seen[step + 1]["first"] for step, value in curve)
    history = callback._run.report.history
    assert history.metric == "val_loss"
    assert [step for step, _, _ in history.points] == [7, 15, 23, 31]  # as the loggers count
    assert history.points[-1][1] == callback.sparsity
    kept = {
        name: sum(n for n, left in zip(counts, edges, strict=False) if left >= 0)
        for name, (counts, edges) in history.histograms.items()
    }
    assert kept.keys() == {"first", "last"}
    assert 0.1 * 256 < sum(kept.values()) < 0.5 * 256  # M at the step when the masks became final


def test_the_monitored_metric_is_followed():
    callback = AutoPruneCallback()
    saving = ModelCheckpoint("c", monitor="train_loss")
    fit([callback, saving], val=loader(seed=3), enable_checkpointing=True)
    assert callback._run.report.history.metric == "train_loss"


@pytest.mark.parametrize("options", [{"enabled": False}, {}], ids=str)
def test_curves_and_layers_are_empty_before_fitting(options):
    callback = AutoPruneCallback(**options)
    assert (callback.curves, callback.layers()) == ({}, [])


POINTS = st.lists(st.tuples(st.integers(), st.floats(0, 1), st.floats(-3, 3) | st.just(float("nan"))), max_size=40)


@given(POINTS, st.sampled_from(["min", "max"]))
def test_points_are_on_the_pareto_front_exactly_if_no_other_beats_them(points, mode):
    sign = 1 if mode == "min" else -1
    front = find_pareto_front([MetricPoint(*point) for point in points], mode)
    for i, (_, sparsity, value) in enumerate(points):
        others = [v * sign for j, (_, s, v) in enumerate(points) if s >= sparsity and j != i and v == v]
        if i in front:
            assert all(value * sign <= other for other in others)
        else:
            assert math.isnan(value) or any(other <= value * sign for other in others)


@pytest.mark.parametrize("place", [0, 141, 398])
def test_the_best_validation_stays_however_many_there_are(place):
    history = RunHistory()
    for step in range(399):
        history.record_metric("val_loss", step, 0.5, 0.01 if step == place else 1.0)
    assert (place, 0.5, 0.01) in history.points
