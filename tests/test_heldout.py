from __future__ import annotations

import random
from collections import namedtuple
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.heldout import (
    FixedSplitSampler,
    HeldOutBatches,
    isolated_random,
    mix,
    shard_batch,
    split_batch,
    split_loader,
)

Pair = namedtuple("Pair", ["x", "y"])


def rebuilt(loader, sampler):
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler)


# Random numbers


def test_random_numbers_outside_are_as_if_the_block_had_not_been():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    with isolated_random(5):
        draw()
    assert draw() == expected


def test_random_numbers_inside_depend_on_the_seeds_alone():
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
def test_a_mixed_seed_fits_into_63_bits(seeds):
    assert 0 <= mix(*seeds) < 2**63


# A part of each batch


@given(st.integers(1, 50), st.floats(0.01, 0.99), st.integers(0, 9))
def test_both_parts_together_are_the_batch_and_share_no_row(rows, fraction, seed):
    x = torch.arange(rows)
    rest, held = split_batch((x, x * 2), fraction, seed)
    if held is None:
        assert round(fraction * rows) in (0, rows)
        assert rest[0] is x
        return
    assert len(held[0]) == round(fraction * rows)
    assert sorted(rest[0].tolist() + held[0].tolist()) == x.tolist()
    assert torch.equal(held[1], 2 * held[0])


def test_rows_held_out_change_with_the_step_and_repeat_with_the_seed():
    def held(*seeds):
        return split_batch(torch.arange(100), 0.5, *seeds)[1].tolist()

    assert held(0, 1) == held(0, 1)
    assert held(0, 1) != held(0, 2)


def test_every_kind_of_nesting_is_split_row_by_row():
    batch = {
        "pair": Pair(torch.arange(4), torch.arange(4) * 10),
        "list": [torch.arange(4), (torch.arange(4).view(4, 1),)],
        "texts": ["a", "b", "c", "d"],
        "boxes": [torch.zeros(i + 1) for i in range(4)],
        "scale": torch.tensor(2.0),
        "name": "batch",
        "nothing": None,
    }
    rest, held = split_batch(batch, 0.25, 0)
    (row,) = held["pair"].x.tolist()
    assert isinstance(held["pair"], Pair)
    assert held["pair"].y.tolist() == [row * 10]
    assert held["list"][0].tolist() == held["list"][1][0].flatten().tolist() == [row]
    assert held["texts"] == ["abcd"[row]]
    assert [len(box) for box in held["boxes"]] == [row + 1]
    assert (held["scale"], held["name"], held["nothing"]) == (2.0, "batch", None)
    assert len(rest["texts"]) == 3
    assert sorted(rest["texts"] + held["texts"]) == batch["texts"]


def test_a_list_of_as_many_columns_as_rows_is_split_by_rows():
    rest, held = split_batch([torch.arange(3), torch.arange(3) * 10, ["a", "b", "c"]], 1 / 3, 0)
    (row,) = held[0].tolist()
    assert held == [held[0], held[1], ["abc"[row]]]
    assert held[1].tolist() == [10 * row]
    assert len(rest[2]) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("text", "A batch of type str has no tensor with rows to hold out"),
        ((torch.zeros(4), torch.zeros(3, 2)), r"tensors of 4 and of 3 rows \(shape \(3, 2\)\), so its rows can't be"),
        ((torch.zeros(4), object()), "A batch holds a object, whose rows can't be split"),
    ],
)
def test_a_batch_that_has_no_rows_is_refused(batch, message):
    with pytest.raises(AutoPruneError, match=message):
        split_batch(batch, 0.5, 0)


# A part of the training set


def train_loader(**options):
    return DataLoader(TensorDataset(torch.arange(40)), batch_size=4, **options)


def indices(loader) -> list[int]:
    return [i for (batch,) in loader for i in batch.tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_two_loaders_share_no_row_and_miss_none(shuffle):
    train, held_out, sampler = split_loader(train_loader(shuffle=shuffle), 0.2, 0, rebuilt)
    assert len(sampler) == 32
    assert len(train) == 8
    for _ in range(3):
        assert sorted(indices(train) + indices(held_out)) == list(range(40))


def test_the_order_and_the_random_numbers_are_those_of_the_users_sampler():
    torch.manual_seed(4)
    order = list(RandomSampler(range(40)))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    sampler = FixedSplitSampler(RandomSampler(range(40)), [3, 5, 7])
    assert list(sampler) == [i for i in order if i not in (3, 5, 7)]
    assert torch.equal(torch.get_rng_state(), state)


def test_in_the_last_phase_all_rows_are_trained_on_and_the_length_stays():
    step = 0
    sampler = FixedSplitSampler(SequentialSampler(range(40)), list(range(8)), seed=1, clock=lambda: step)
    sampler.finetune = True
    seen = set()
    for step in range(0, 120, 10):  # noqa: B007
        order = list(sampler)
        assert len(order) == len(sampler) == 32
        seen.update(order)
    assert seen == set(range(40))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


@pytest.mark.parametrize(
    ("loader", "fraction", "message"),
    [
        ([1, 2], 0.5, "A fixed held-out fraction needs one DataLoader, not list"),
        (DataLoader(Stream()), 0.5, r"training data is an IterableDataset, .*: pass `held_out=DataLoader\(...\)`"),
        (
            train_loader(sampler=WeightedRandomSampler([1.0] * 40, 40)),
            0.5,
            "has the sampler WeightedRandomSampler and the batch sampler BatchSampler",
        ),
        (train_loader(), 0.001, "`held_out=0.001` of 40 training rows holds 0 out and leaves 40 to train on"),
        (train_loader(), 0.999, "`held_out=0.999` of 40 training rows holds 40 out and leaves 0 to train on"),
    ],
)
def test_a_loader_that_can_not_be_split_is_refused(loader, fraction, message):
    with pytest.raises(AutoPruneError, match=message):
        split_loader(loader, fraction, 0, rebuilt)


# Batches from a loader, again and again


def stream(seed: int = 0) -> HeldOutBatches:
    return HeldOutBatches(train_loader(shuffle=True), seed)


def take(source: HeldOutBatches, n: int) -> list[list[int]]:
    return [next(source)[0].tolist() for _ in range(n)]


def test_each_pass_has_all_rows_in_another_order():
    first, second = take(s := stream(), 10), take(s, 10)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(40))


@pytest.mark.parametrize("position", [0, 3, 10, 14])
def test_a_restored_stream_goes_on_as_if_it_had_not_stopped(position):
    source = stream()
    take(source, position)
    state = source.state_dict()
    expected = take(source, 25)
    restored = stream()
    restored.load_state_dict(state)
    assert take(restored, 25) == expected


def test_drawing_batches_leaves_the_users_random_numbers_alone():
    state = torch.get_rng_state()
    take(stream(), 15)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_the_users_is_left_as_it_was():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    source = HeldOutBatches(train_loader(shuffle=True, generator=generator), 0, [generator])
    first, second = take(source, 10), take(source, 10)
    assert first != second
    assert torch.equal(generator.get_state(), state)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(AutoPruneError, match="The held-out loader gives no batches"):
        next(HeldOutBatches([]))


@given(rows=st.integers(1, 40), ranks=st.integers(1, 6))
def test_the_ranks_share_a_batch_out_and_their_weighted_mean_is_that_of_the_whole(rows, ranks):
    batch = torch.arange(rows, dtype=torch.float64)
    parts, weights = zip(*(shard_batch(batch, rank, ranks) for rank in range(ranks)), strict=True)
    assert sum(weights) == pytest.approx(ranks)
    mean = sum(weight * part.mean() for part, weight in zip(parts, weights, strict=True)) / ranks
    assert float(mean) == pytest.approx(float(batch.mean()))
    if rows >= 2 * ranks:
        assert torch.equal(torch.cat(parts).sort().values, batch)
        assert min(len(part) for part in parts) >= 2
    else:
        assert all(torch.equal(part, batch) for part in parts)
