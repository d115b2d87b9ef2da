"""A part of the training set that is held out for the whole run. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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

__all__ = ["FixedSplitSampler", "split_loader"]


class FixedSplitSampler(Sampler[int]):
    """A sampler without the rows held out, in the order and with the random numbers of the one it wraps.

    Its length never changes, so that an epoch has as many steps in every phase. Once ``finetune`` is set, as many
    rows sit out, but others each epoch: W trains on all the data.

    Args:
        sampler: goes once through all rows of a dataset.
        held_out: indices of the rows held out.
        seed: decides, together with the clock, which rows sit out in the epochs of the last phase.
        clock: tells how many training steps are over.
    """

    def __init__(
        self, sampler: Sampler[int], held_out: Sequence[int], seed: int = 0, clock: Callable[[], int] = int
    ) -> None:
        self.sampler, self.held_out, self.seed, self.clock = sampler, frozenset(held_out), seed, clock
        self.finetune = False

    def set_epoch(self, epoch: int) -> None:
        """Passes on which epoch comes next (Lightning calls this)."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) - len(self.held_out)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        out = self.held_out
        if self.finetune:
            out = frozenset(_draw(len(self.sampler), len(out), self.seed, self.clock()))  # type: ignore[arg-type]
        return (index for index in self.sampler if index not in out)


def split_loader(
    loader: Any,
    fraction: float,
    seed: int,
    rebuild: Callable[[DataLoader[Any], Iterable[int]], DataLoader[Any]],
    clock: Callable[[], int] = int,
) -> tuple[DataLoader[Any], DataLoader[Any], FixedSplitSampler]:
    """Splits a training loader for the whole run into a training part and a held-out part.

    Args:
        loader: a map-style ``DataLoader``, shuffled or not.
        fraction: share of the rows to hold out, in (0, 1).
        seed: decides which rows.
        rebuild: makes a loader like the given one with another sampler.
        clock: tells how many training steps are over, see :class:`FixedSplitSampler`.

    Returns:
        The training loader over the remaining rows, a shuffled loader over the rows held out, and the sampler of the
        former.

    Raises:
        AutoPruneError: if the loader can't be split (iterable dataset, its own sampler, several loaders), or a
            part would be empty.
    """
    way_out = "Pass `held_out=DataLoader(...)` with data of its own, or `redraw_held_out=True`."
    if not isinstance(loader, DataLoader):
        raise AutoPruneError(f"A fixed held-out fraction needs one DataLoader, not {type(loader).__name__}. {way_out}")
    if isinstance(loader.dataset, IterableDataset):
        raise iterable_error()
    plain = isinstance(loader.sampler, SequentialSampler) or (
        isinstance(loader.sampler, RandomSampler)
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not plain or type(loader.batch_sampler) is not BatchSampler or loader.batch_size is None:
        raise AutoPruneError(
            "A fixed held-out fraction needs a loader that goes once through its dataset in batches; this one has the"
            f" sampler {type(loader.sampler).__name__} and the batch sampler {type(loader.batch_sampler).__name__}."
            f" {way_out}"
        )
    rows = len(loader.dataset)  # type: ignore[arg-type]
    held = round(fraction * rows)
    if not 0 < held < rows:
        raise AutoPruneError(
            f"`held_out={fraction}` of {rows} training rows holds {held} out and leaves {rows - held} to train on;"
            " neither may be empty. Choose another fraction, or pass a DataLoader."
        )
    indices = _draw(rows, held, seed, -1)
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
    sampler = FixedSplitSampler(loader.sampler, indices, seed, clock)  # type: ignore[arg-type]
    return rebuild(loader, sampler), held_out, sampler


def iterable_error() -> AutoPruneError:
    """The refusal of a held-out fraction of an iterable dataset."""
    return AutoPruneError(
        "`held_out` is a fraction, but the training data is an IterableDataset, whose rows can't be told apart: pass"
        ' `held_out=DataLoader(...)` with other rows, or `held_out="train"`.'
    )


def _draw(rows: int, count: int, *seeds: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(derive_seed(*seeds)))[:count].tolist()
