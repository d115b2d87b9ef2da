"""Loaders of every kind, for training, validation and held-out data, under the callback."""

from __future__ import annotations

import pytest
from helpers import Net, data, fit, loader
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler

from lightning_autoprune import AutoPruneCallback


@pytest.mark.parametrize("held_out", [0.25, "train"])
def test_batches_that_are_none_are_skipped(held_out):
    batches = [None if i % 3 == 1 else batch for i, batch in enumerate(loader())]
    train = DataLoader(batches, batch_size=None)
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)
    fit(callback, train=train)
    assert callback.sparsity > 0.3


def test_a_training_loader_that_is_held_out_too_still_gives_all_its_batches():
    class Count(Callback):
        def on_train_batch_start(self, trainer, *_):
            counts[trainer.current_epoch] += 1

    counts = [0] * 4
    train = DataLoader(data(), batch_size=16, num_workers=1, persistent_workers=True)
    fit([AutoPruneCallback(target_sparsity=0.8, held_out=train), Count()], train=train)
    assert counts == [8] * 4


def test_held_out_validation_batches_are_those_of_the_users_batch_sampler():
    class Counts(Net):
        def training_step(self, batch):
            sizes.append(len(batch[0]))
            return super().training_step(batch)

    sizes = []
    sampler = BatchSampler(SubsetRandomSampler(range(32)), 8, False)
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="val")
    fit(callback, model=Counts(), val=DataLoader(data(), batch_sampler=sampler))
    assert set(sizes) == {8, 16}


@pytest.mark.filterwarnings("ignore:.*fits the masks on the data")
def test_validation_loaders_that_lightning_has_not_set_up_yet_are_found():
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="val")
    fit(callback, val=loader(seed=3), num_sanity_val_steps=0, check_val_every_n_epoch=3)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*fits the masks on the data")
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_validation_loaders_that_run_side_by_side_give_combined_batches(mode):
    class Both(Net):
        def training_step(self, batch):
            sizes.append(tuple(len(x) for x, _ in batch.values()))
            return sum(super(Both, self).training_step(part) for part in batch.values())

        def validation_step(self, batch):
            self.training_step(batch)

    def combined(rows, batch):
        return CombinedLoader({"a": loader(rows, batch), "b": loader(rows // 2, batch, shuffle=True)}, mode)

    sizes = []
    callback = AutoPruneCallback(target_sparsity=0.8, held_out="val")
    fit(callback, model=Both(), train=combined(128, 16), val=combined(64, 8), num_sanity_val_steps=0)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert set(sizes) == {(16, 16), (8, 8)}
