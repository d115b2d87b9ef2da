"""A part of the training set that is held out for the whole run, and the sampler that leaves it out."""

from __future__ import annotations

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
from lightning_autoprune.training.held_out.fixed_split import FixedSplitSampler, split_loader


def rebuild(loader, sampler):
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler)


def train_loader(**options):
    return DataLoader(TensorDataset(torch.arange(40)), batch_size=4, **options)


def indices(loader) -> list[int]:
    return [i for (batch,) in loader for i in batch.tolist()]


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_two_loaders_share_no_sample_and_miss_none(shuffle):
    train, held_out, sampler = split_loader(train_loader(shuffle=shuffle), 0.2, 0, rebuild)
    assert len(sampler) == 32
    assert len(train) == 8
    for _ in range(3):
        assert sorted(indices(train) + indices(held_out)) == list(range(40))


def test_order_and_random_numbers_are_those_of_the_users_sampler():
    torch.manual_seed(4)
    order = list(RandomSampler(range(40)))
    state = torch.get_rng_state()
    torch.manual_seed(4)
    sampler = FixedSplitSampler(RandomSampler(range(40)), [3, 5, 7])
    assert list(sampler) == [i for i in order if i not in (3, 5, 7)]
    assert torch.equal(torch.get_rng_state(), state)


def test_redrawing_each_epoch_trains_on_all_samples_in_epochs_of_the_same_length():
    step = 0
    sampler = FixedSplitSampler(SequentialSampler(range(40)), list(range(8)), seed=1, steps_done=lambda: step)
    sampler.redraw_each_epoch = True
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
        (train_loader(), 0.001, "`held_out=0.001` of 40 training samples holds 0 out and leaves 40 to train on"),
        (train_loader(), 0.999, "`held_out=0.999` of 40 training samples holds 40 out and leaves 0 to train on"),
    ],
)
def test_a_loader_that_can_not_be_split_is_refused(loader, fraction, message):
    with pytest.raises(AutoPruneError, match=message):
        split_loader(loader, fraction, 0, rebuild)
