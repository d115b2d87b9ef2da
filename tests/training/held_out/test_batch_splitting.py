"""Splitting collated batches by row: which batches are plain, and which parts the ranks get."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from dataclasses import InitVar, dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_splitting import (
    count_rows,
    draw_samples,
    number_to_hold_out,
    part_of_rank,
    take_rows,
)

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass
class Derived:
    x: torch.Tensor
    rows: int = field(init=False, default=0)


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor


@dataclass
class Scaled:
    """Changes what it is made of, as a batch that normalizes its images does."""

    x: torch.Tensor
    factor: InitVar[int]

    def __post_init__(self, factor):
        self.x = self.x * factor


class Output(Sample, dict):
    """A dataclass that is something else as well, such as a model's output."""


# Numbers of samples


@given(st.integers(0, 60), st.floats(0.001, 0.999), st.integers(0, 3))
def test_the_number_held_out_is_the_rounded_share_unless_a_part_would_be_too_small(samples, fraction, min_samples):
    held = number_to_hold_out(samples, fraction, min_samples)
    assert 0 <= held <= samples
    least = min(min_samples, samples // 2)
    assert min(held, samples - held) >= least
    if min(round(fraction * samples), samples - round(fraction * samples)) >= least:
        assert held == round(fraction * samples)


@given(st.integers(1, 60), st.data(), st.integers(0, 9))
def test_the_two_parts_make_up_the_batch_share_no_sample_and_keep_its_order(samples, numbers, seed):
    held = numbers.draw(st.integers(0, samples))
    rest, chosen = draw_samples(samples, held, seed)
    assert len(chosen) == held
    assert sorted(rest + chosen) == list(range(samples))
    assert (rest, chosen) == (sorted(rest), sorted(chosen))


def test_the_draw_repeats_with_the_seeds_and_changes_with_each_of_them():
    torch.manual_seed(0)
    draws = {seeds: tuple(draw_samples(100, 25, *seeds)[1]) for seeds in ((0, 1), (1, 1), (0, 2))}
    assert len(set(draws.values())) == 3
    torch.manual_seed(1)
    assert all(tuple(draw_samples(100, 25, *seeds)[1]) == found for seeds, found in draws.items())


def test_every_sample_is_as_likely_to_be_held_out():
    counts = torch.zeros(16)
    for step in range(2000):
        counts[draw_samples(16, 4, 0, step)[1]] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.05


# Plain batches


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(4),
        (torch.arange(4), torch.arange(4.0).view(4, 1)),
        [torch.arange(4), {"x": torch.arange(4), "more": [torch.arange(4)] * 3}],
        {"pair": Pair(torch.arange(4), torch.arange(4) * 1.0), "nothing": None},
        Sample(torch.arange(4), torch.arange(4)),
        Sample(torch.arange(4)),
        [Sample(torch.arange(4))] * 5,
        default_collate([(torch.tensor(i), {"y": torch.tensor(i)}) for i in range(4)]),
        [torch.arange(4), torch.arange(4) * 1.0, torch.arange(4).view(4, 1), torch.arange(4).int()],
    ],
)
def test_rows_are_taken_in_every_kind_of_nesting(batch):
    assert count_rows(batch) == 4
    part = take_rows(batch, [1, 3])
    assert count_rows(part) == 2
    assert type(part) is type(batch)

    def check(whole, taken):
        assert type(taken) is type(whole)
        if isinstance(whole, torch.Tensor):
            assert taken.flatten().tolist() == [1, 3]
            assert (taken.shape[1:], taken.dtype) == (whole.shape[1:], whole.dtype)
        elif isinstance(whole, dict):
            assert list(whole) == list(taken)
            check(list(whole.values()), list(taken.values()))
        elif isinstance(whole, Sample):
            check((whole.x, whole.mask), (taken.x, taken.mask))
        elif whole is not None:
            for one, other in zip(whole, taken, strict=True):
                check(one, other)

    check(batch, part)


@pytest.mark.parametrize("batch", [Slotted(torch.arange(4)), Frozen(torch.arange(4)), Scaled(torch.arange(4), 2)])
def test_rows_of_a_dataclass_are_taken_from_its_fields_as_they_are_now(batch):
    whole = batch.x.clone()
    assert count_rows(batch) == 4
    part = take_rows(batch, [1, 3])
    assert type(part) is type(batch)
    assert torch.equal(part.x, whole[[1, 3]])
    assert torch.equal(batch.x, whole)


def test_all_rows_are_a_copy_that_may_be_written_to():
    batch = {"x": torch.zeros(3)}
    copy = take_rows(batch, range(3))
    copy["x"].add_(1)
    assert batch["x"].tolist() == [0, 0, 0]


@given(samples=st.integers(1, 30), held=st.integers(0, 30), seed=st.integers(0, 5))
def test_both_parts_of_a_plain_batch_pair_the_same_rows(samples, held, seed):
    batch = {"x": torch.arange(samples), "y": torch.arange(samples) * 10}
    for places in draw_samples(samples, min(held, samples), seed):
        part = take_rows(batch, places)
        assert part["x"].tolist() == places
        assert torch.equal(part["y"], 10 * part["x"])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "a batch has an object of type str, whose rows can't be told apart"),
        (None, "a batch of type NoneType has no tensor with rows"),
        ({}, "a batch of type dict has no tensor with rows"),
        ((torch.zeros(4), torch.zeros(3, 2)), r"tensors of 4 and of 3 rows \(shapes \(4,\) and \(3, 2\)\)"),
        ((torch.zeros(4), torch.tensor(1.0)), r"a batch has a tensor of shape \(\) of type Tensor"),
        ((torch.zeros(4), object()), "a batch has an object of type object"),
        ((torch.zeros(4), ["a", "b", "c", "d"]), "an object of type str"),
        ((torch.zeros(4), 2.0), "an object of type float"),
        (torch.eye(4).to_sparse(), r"a tensor of shape \(4, 4\) of type Tensor"),
        (torch.nn.Parameter(torch.zeros(4)), r"a tensor of shape \(4,\) of type Parameter"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "of type NestedTensor"),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(4)]), "an object of type PackedSequence"),
        (defaultdict(list, x=torch.zeros(4)), "an object of type defaultdict"),
        (Output(torch.zeros(4)), "an object of type Output"),
        (Derived(torch.zeros(4)), "an object of type Derived"),
        ([torch.zeros(4, 2) for _ in range(4)], "a batch has a list of 4 tensors, and each may be a sample"),
        ((tuple(torch.zeros(4) for _ in range(5)), torch.zeros(4)), "a tuple of 5 tensors, and each may be a sample"),
    ],
)
def test_a_batch_that_is_not_plain_is_refused(batch, message):
    with pytest.raises(AutoPruneError, match=message):
        count_rows(batch)


# The parts of the ranks


@given(samples=st.integers(1, 40), ranks=st.integers(1, 6))
def test_the_parts_of_the_ranks_make_up_the_batch_and_their_weighted_mean_is_its_mean(samples, ranks):
    batch = torch.arange(samples, dtype=torch.float64)
    parts, weights = zip(*(part_of_rank(batch, rank, ranks) for rank in range(ranks)), strict=True)
    assert sum(weights) == pytest.approx(ranks)
    mean = sum(weight * part.mean() for part, weight in zip(parts, weights, strict=True)) / ranks
    assert float(mean) == pytest.approx(float(batch.mean()))
    if samples >= 2 * ranks:
        assert torch.equal(torch.cat(parts).sort().values, batch)
        assert min(len(part) for part in parts) >= 2
    else:
        assert all(torch.equal(part, batch) for part in parts)


def test_every_rank_gets_the_whole_of_a_batch_that_is_not_plain():
    batch = ["a", "b", "c", "d"]
    assert part_of_rank(batch, 1, 2) == (batch, 1.0)
