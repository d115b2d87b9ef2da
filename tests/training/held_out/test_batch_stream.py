from __future__ import annotations

from collections import namedtuple
from itertools import chain

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_stream import HeldOutBatches
from lightning_autoprune.training.held_out.fixed_split import FixedSplitSampler, split_loader

Pair = namedtuple("Pair", ["x", "y"])


def rebuilt(loader, sampler):
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler)


# Random numbers


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
