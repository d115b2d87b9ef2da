"""A part of the training set that is held out for the whole run. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import derive_seed

__all__ = ["FixedSplitSampler", "LoaderSplit", "iterable_dataset_error", "split_loader"]


class FixedSplitSampler(Sampler[int]):
    """A sampler that wraps another one and leaves out the held-out samples; order and random numbers are unchanged.

    Its length never changes, so that an epoch has the same number of steps in every phase. Once ``redraw_each_epoch``
    is set, nothing is held out any more. As many samples are left out, but others in each epoch: W trains on all data.

    Args:
        sampler: the sampler to wrap, which goes once through all samples of a dataset.
        held_out: the indices of the held-out samples.
        seed: together with the number of steps, it decides which samples are left out once they are redrawn.
        steps_done: returns the number of training steps that are over.
    """

    def __init__(
        self, sampler: Sampler[int], held_out: Sequence[int], seed: int = 0, steps_done: Callable[[], int] = int
    ) -> None:
        self.sampler, self.held_out, self.seed, self.steps_done = sampler, frozenset(held_out), seed, steps_done
        self.redraw_each_epoch = False

    def set_epoch(self, epoch: int) -> None:
        """Tell the wrapped sampler which epoch comes next (Lightning calls this)."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) - len(self.held_out)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        left_out = self.held_out
        if self.redraw_each_epoch:
            samples = len(self.sampler)  # type: ignore[arg-type]
            left_out = frozenset(_draw_indices(samples, len(left_out), self.seed, self.steps_done()))
        return (index for index in self.sampler if index not in left_out)


class LoaderSplit(NamedTuple):
    """A training loader in two parts.

    Attributes:
        train: the training loader, over the remaining samples.
        held_out: a shuffled loader over the held-out samples.
        sampler: the sampler of ``train``.
    """

    train: DataLoader[Any]
    held_out: DataLoader[Any]
    sampler: FixedSplitSampler


def split_loader(
    loader: Any,
    fraction: float,
    seed: int,
    rebuild: Callable[[DataLoader[Any], Iterable[int]], DataLoader[Any]],
    steps_done: Callable[[], int] = int,
) -> LoaderSplit:
    """Split a training loader for the whole run into a training part and a held-out part.

    Args:
        loader: a map-style ``DataLoader``, shuffled or not.
        fraction: fraction of the samples to hold out, in (0, 1).
        seed: decides which samples.
        rebuild: makes a loader like the given one with another sampler.
        steps_done: returns the number of training steps that are over, see :class:`FixedSplitSampler`.

    Raises:
        AutoPruneError: if the loader can't be split (an iterable dataset, a sampler of the user's, several loaders), or
            if a part would be empty.
    """
    way_out = "Pass `held_out=DataLoader(...)` with other data, or `redraw_held_out=True`."
    if not isinstance(loader, DataLoader):
        raise AutoPruneError(f"A fixed held-out fraction needs one DataLoader, not {type(loader).__name__}. {way_out}")
    if isinstance(loader.dataset, IterableDataset):
        raise iterable_dataset_error()
    has_plain_sampler = isinstance(loader.sampler, SequentialSampler) or (
        isinstance(loader.sampler, RandomSampler)
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not has_plain_sampler or type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise AutoPruneError(
            "A fixed held-out fraction needs a loader that goes once through its dataset in batches; this one has the"
            f" sampler {type(loader.sampler).__name__} and the batch sampler {type(loader.batch_sampler).__name__}."
            f" {way_out}"
        )
    samples = len(loader.dataset)  # type: ignore[arg-type]
    held = round(fraction * samples)
    if not 0 < held < samples:
        raise AutoPruneError(
            f"`held_out={fraction}` of {samples} training samples holds {held} out and leaves {samples - held} to train"
            " on; neither may be empty. Choose another fraction, or pass a DataLoader."
        )
    indices = _draw_indices(samples, held, seed, -1)
    held_out = DataLoader(
        Subset(loader.dataset, sorted(indices)),
        batch_size=min(held, loader.batch_size or held),
        shuffle=True,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        drop_last=True,
    )
    sampler = FixedSplitSampler(loader.sampler, indices, seed, steps_done)  # type: ignore[arg-type]
    return LoaderSplit(rebuild(loader, sampler), held_out, sampler)


def iterable_dataset_error() -> AutoPruneError:
    """Return the error for a held-out fraction of an iterable dataset."""
    return AutoPruneError(
        "`held_out` is a fraction, but the training data is an IterableDataset, whose samples can't be told apart: pass"
        ' `held_out=DataLoader(...)` with other samples, or `held_out="train"`.'
    )


def _draw_indices(samples: int, count: int, *seeds: int) -> list[int]:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(derive_seed(*seeds)))[:count].tolist()
