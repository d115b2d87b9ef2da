"""The second loader, which loads the held-out batches as the user's loader loads its own."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_autoprune.training.held_out.following_loader import FollowingLoader


class Noisy(Dataset):
    """Draws from all generators for each sample."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index + torch.rand(()).item() / 10 + np.random.rand() / 100 + random.random() / 1000


class Process(Dataset):
    """Tells which process loads a sample, and how long the dataset was when that process began."""

    size = 10

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return os.getpid(), self.size


def states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=8), st.data())
def test_batches_come_in_the_order_of_the_lists_however_few_lists_are_added_at_a_time(lists, numbers):
    following = FollowingLoader(DataLoader(range(10), batch_size=4), 0.5, seed=0)
    added, found = 0, []
    while len(found) < len(lists):
        more = numbers.draw(st.integers(0, 3))
        for indices in lists[added : added + more]:
            following.add(indices)
        added = min(added + more, len(lists))
        if len(found) < added:
            found.append(following.next_batch().tolist())
    assert found == lists
    with pytest.raises(LookupError, match="no indices were added"):
        following.next_batch()


def test_workers_that_ran_out_of_lists_go_on():
    following = FollowingLoader(DataLoader(range(10), batch_size=4, num_workers=2), 1.0, seed=0)
    for lists in ([[1, 2]], [[3], [4, 5], [6, 7], [8]], [[9]]):
        for indices in lists:
            following.add(indices)
        assert [following.next_batch().tolist() for _ in lists] == lists
    following.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_users_random_numbers_are_untouched_and_ours_repeat_with_the_seed(workers):
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(
        Noisy(), 4, sampler=RandomSampler(range(20), generator=generator), num_workers=workers, generator=generator
    )

    def load(seed, add=0):
        following = FollowingLoader(loader, 0.5, seed)
        for _ in range(2):
            following.add([1, 2, 3])
        found = torch.stack([following.next_batch(7 + i + add) for i in range(2)])
        following.close()
        return found

    before = states(), generator.get_state().tolist()
    first = load(0)
    assert (states(), generator.get_state().tolist()) == before
    torch.manual_seed(3)
    assert torch.equal(load(0), first)
    assert not torch.equal(load(1), first)
    assert torch.equal(load(0, add=1), first) == bool(workers)  # workers have seeds of their own


def test_the_loader_itself_is_not_changed():
    loader = DataLoader(range(10), batch_size=4)
    before = dict(vars(loader))
    following = FollowingLoader(loader, 0.5, seed=0)
    following.add([1])
    following.next_batch()
    assert vars(loader) == before


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_are_a_share_live_while_lists_run_out_and_end_with_the_source(persistent):
    loader = DataLoader(Process(), 2, num_workers=3, persistent_workers=persistent, collate_fn=list)
    following = FollowingLoader(loader, 0.5, seed=0)

    def pids():
        for i in range(4):
            following.add([i])
        return {following.next_batch()[0][0] for _ in range(4)}

    first = pids()
    assert len(first) == 2  # a half of three, rounded up
    assert os.getpid() not in first
    assert pids() == first
    following.start_again()
    assert (pids() == first) == persistent
    last = pids()
    following.close()
    deadline = time.monotonic() + 10
    while any(map(is_alive, last)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, last))


def test_workers_of_a_new_pass_see_the_dataset_as_it_is_then():
    dataset = Process()
    following = FollowingLoader(DataLoader(dataset, 2, num_workers=1, collate_fn=list), 0.5, seed=0)
    sizes = []
    for size in (10, 20):
        dataset.size = size
        following.start_again()
        following.add([0])
        sizes.append(following.next_batch()[0][1])
    following.close()
    assert sizes == [10, 20]


def test_a_new_pass_forgets_the_lists_of_the_one_before():
    following = FollowingLoader(DataLoader(range(10), batch_size=4), 0.5, seed=0)
    following.add([1])
    following.start_again()
    following.add([2])
    assert following.next_batch().tolist() == [2]
