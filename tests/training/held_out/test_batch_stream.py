"""An endless stream of batches: its order, its random numbers, and restoring its position."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_stream import HeldOutBatches


def shuffled_loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(40)), batch_size=4, shuffle=True, **options)


def stream(seed: int = 0) -> HeldOutBatches:
    return HeldOutBatches(shuffled_loader(), seed)


def take(source: HeldOutBatches, n: int) -> list[list[int]]:
    return [next(source)[0].tolist() for _ in range(n)]


def test_each_pass_has_all_samples_in_another_order():
    first, second = take(s := stream(), 10), take(s, 10)
    assert first != second
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(40))


@pytest.mark.parametrize("position", [0, 3, 10, 14])
def test_a_restored_stream_continues_as_if_it_had_never_stopped(position):
    source = stream()
    take(source, position)
    state = source.state_dict()
    expected = take(source, 25)
    restored = stream()
    restored.load_state_dict(state)
    assert take(restored, 25) == expected


def test_drawing_batches_does_not_change_the_users_random_numbers():
    state = torch.get_rng_state()
    take(stream(), 15)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawing_batches_does_not_change_the_users_generator():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    source = HeldOutBatches(shuffled_loader(generator=generator), 0, [generator])
    first, second = take(source, 10), take(source, 10)
    assert first != second
    assert torch.equal(generator.get_state(), state)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(AutoPruneError, match="The held-out loader gives no batches"):
        next(HeldOutBatches([]))
