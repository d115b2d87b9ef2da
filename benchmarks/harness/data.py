"""The data of the tasks: samples in memory as tensors, or datasets that load one sample after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_autoprune.demo.data import Split, make_loader

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, samples in the first dimension."""

TEST_BATCH = 1000


def make_seeded_loader(samples: Batch, size: int, seed: int) -> DataLoader[Batch]:
    """Return a loader of batches (inputs, labels) whose order depends on the seed alone."""
    split = Split(*samples)
    return make_loader(split, size, sampler=_seeded_sampler(split, seed))


def _seeded_sampler(dataset: Dataset[Any], seed: int) -> RandomSampler:
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Data:
    """Samples in memory to train and to test on.

    Attributes:
        train: inputs and labels to train on, samples in the first dimension.
        test: inputs and labels to test on, samples in the first dimension.
    """

    train: Batch
    test: Batch

    @property
    def train_samples(self) -> int:
        """Return the number of samples to train on."""
        return len(self.train[0])

    def first_inputs(self, count: int) -> Tensor:
        """Return the inputs of the first samples to train on."""
        return self.train[0][:count]

    def train_loader(self, size: int, seed: int, workers: int = 0) -> DataLoader[Batch]:
        """Return a loader of the samples to train on; it needs no workers, since nothing is read or decoded."""
        return make_seeded_loader(self.train, size, seed)

    def test_batches(self, workers: int = 0) -> Iterable[Batch]:
        """Return the samples to test on, in batches."""
        return zip(self.test[0].split(TEST_BATCH), self.test[1].split(TEST_BATCH), strict=True)

    def without_test_set(self) -> Data:
        """Return the training samples alone, with their last sixth to test on, for choosing settings."""
        inputs, labels = self.train
        cut = len(inputs) * 5 // 6
        return Data((inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:]))


@dataclass(frozen=True)
class StreamedData:
    """Datasets to train and to test on whose samples do not fit into memory.

    Attributes:
        train: map-style dataset of pairs (input, label) to train on.
        test: map-style dataset of pairs (input, label) to test on.
    """

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]

    @property
    def train_samples(self) -> int:
        """Return the number of samples to train on."""
        return len(self.train)  # type: ignore[arg-type]

    def first_inputs(self, count: int) -> Tensor:
        """Return the inputs of the first samples to train on."""
        return torch.stack([self.train[i][0] for i in range(min(count, self.train_samples))])

    def train_loader(self, size: int, seed: int, workers: int = 0) -> DataLoader[Batch]:
        """Return a loader of the samples to train on, whose order depends on the seed alone."""
        sampler = _seeded_sampler(self.train, seed)
        options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        return DataLoader(self.train, size, sampler=sampler, **options)

    def test_batches(self, workers: int = 0) -> Iterable[Batch]:
        """Return a loader of the samples to test on."""
        return DataLoader(self.test, 256, num_workers=workers, pin_memory=torch.cuda.is_available())

    def without_test_set(self) -> StreamedData:
        """Refuse: settings are chosen on the small networks."""
        raise NotImplementedError("Settings are not chosen on datasets that do not fit into memory.")
