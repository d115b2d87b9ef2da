"""Held-out data: where the batches that train M come from. Torch only.

A part of the training set that is fixed for the run (:func:`split_loader`), or any loader (:class:`HeldOutBatches` runs
through it again and again). Parts of each training batch are in ``batches``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
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
from lightning_autoprune.random_numbers import isolated_random, mix

__all__ = ["FixedSplitSampler", "HeldOutBatches", "split_loader"]


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


class HeldOutBatches:
    """An endless stream of batches from a loader, whose position can be saved and restored.

    Each batch is drawn with random numbers of its own, so the user's are untouched and a restored stream goes on
    as if it had never stopped.

    Args:
        loader: an iterable of batches that can be gone through again and again.
        seed: decides the order, together with the number of the pass.
        generators: those that the loader draws from beside the global ones.

    Example:
        >>> stream = HeldOutBatches([10, 20, 30])
        >>> [next(stream) for _ in range(4)]
        [10, 20, 30, 10]
        >>> stream.state_dict()
        {'passes': 1, 'position': 1}
    """

    def __init__(self, loader: Any, seed: int = 0, generators: Sequence[torch.Generator] = ()) -> None:
        self.loader, self.seed, self.generators = loader, seed, generators
        self.passes, self.position = 0, 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for _ in range(2):  # the second time from the start of the next pass
            with isolated_random(self.seed, self.passes, self.position, generators=self.generators):
                if self._iterator is None:
                    self._iterator = iter(own(self.loader))
                batch = next(self._iterator, self)
            if batch is not self:
                self.position += 1
                return batch
            self.passes, self.position, self._iterator = self.passes + 1, 0, None
        raise empty_error()

    def close(self) -> None:
        """Lets go of the loader's iterator, and with it of worker processes; the position stays."""
        self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """How many passes are over, and how many batches of this one."""
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved position, reading the batches of the pass that come before it."""
        self.passes, self.position, self._iterator = state["passes"], 0, None
        while self.position < state["position"]:
            next(self)


def own(loader: Any) -> Any:
    """A loader whose iterator nobody else uses: with persistent workers a ``DataLoader`` has but one."""
    if isinstance(loader, DataLoader):
        loader = copy(loader)
        loader._iterator = None
    return loader


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Those that loaders and their samplers draw from, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for place in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            generator = getattr(place, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def empty_error() -> AutoPruneError:
    """The refusal of a held-out loader without batches."""
    return AutoPruneError("The held-out loader gives no batches: it is empty, or `drop_last` leaves nothing.")


def iterable_error() -> AutoPruneError:
    """The refusal of a held-out fraction of an iterable dataset."""
    return AutoPruneError(
        "`held_out` is a fraction, but the training data is an IterableDataset, whose rows can't be told apart: pass"
        ' `held_out=DataLoader(...)` with other rows, or `held_out="train"`.'
    )


def _draw(rows: int, count: int, *seeds: int) -> list[int]:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mix(*seeds)))[:count].tolist()
