"""Loads held-out batches as the user's loader loads batches, of indices that are given one list after the other."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_autoprune.tensors.random_state import derive_seed, isolated_random
from lightning_autoprune.training.held_out.batch_stream import find_generators

__all__ = ["FollowingLoader"]

_END = object()


class FollowingLoader:
    """A second loader over the same samples, with the ``collate_fn`` and the kind of workers of the first.

    Its workers prefetch the lists of indices that were added so far.

    Args:
        loader: the user's loader.
        fraction: fraction of the samples that come from here, in (0, 1], and with it of the loader's number of workers.
        seed: of the random numbers with which samples are loaded; the user's are untouched.
        finish: called with each batch that is loaded, with the same random numbers; returns the batch to use.

    Example:
        >>> following = FollowingLoader(DataLoader(range(10), batch_size=4), 0.25, seed=0)
        >>> following.add([3, 5])
        >>> following.add([8, 9])
        >>> following.next_batch(), following.next_batch()
        (tensor([3, 5]), tensor([8, 9]))
    """

    def __init__(
        self, loader: DataLoader[Any], fraction: float, seed: int, finish: Callable[[Any], Any] | None = None
    ) -> None:
        self._loader, self._fraction, self._seed, self._finish = loader, fraction, seed, finish
        self._lists = _Queue()
        self._own: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] | None = None

    def add(self, indices: Sequence[Any]) -> None:
        """Add the indices of a batch."""
        self._lists.waiting.append(indices)

    def next_batch(self, *seeds: int) -> Any:
        """Return the batch of the indices that were added first.

        Args:
            seeds: integers that seed the random numbers with which it is loaded, if there are no workers.
        """
        with isolated_random(self._seed, *seeds, generators=find_generators([self._loader])):
            for _ in range(2):  # workers that ran out of lists start a new pass
                if self._iterator is None:
                    self._iterator = self._open()
                batch = next(self._iterator, _END)
                if batch is not _END:
                    return self._finish(batch) if self._finish else batch
                self._iterator = None
        raise LookupError("no indices were added")

    def _open(self) -> Iterator[Any]:
        own, users = self._make_loader(), vars(self._loader)
        persistent = users.get("_iterator")
        if persistent is None:
            return iter(own)
        users["_iterator"] = None  # workers may be handed the user's loader, and its live iterator can't be pickled
        try:
            return iter(own)
        finally:
            users["_iterator"] = persistent

    def _make_loader(self) -> DataLoader[Any]:
        if self._own is None:
            self._own = copy(self._loader)
            workers = math.ceil(self._fraction * self._loader.num_workers)
            vars(self._own).update(
                batch_sampler=self._lists,
                num_workers=workers,
                persistent_workers=workers > 0,  # so that a pass that runs out of lists keeps its workers
                generator=torch.Generator().manual_seed(derive_seed(self._seed)),
                _iterator=None,
            )
        return self._own

    def start_again(self) -> None:
        """Forget all lists that were added, at the start of a pass over the user's loader.

        Unless the user's workers stay alive from one pass to the next, new ones are started, and see the dataset as it
        is now.
        """
        self._lists.waiting.clear()
        self._iterator = None
        if not self._loader.persistent_workers:
            self._own = None

    def close(self) -> None:
        """Forget all lists, and end the worker processes."""
        self._lists.waiting.clear()
        self._iterator, self._own = None, None


class _Queue:
    """An iterator over lists that may go on after it has run out."""

    def __init__(self) -> None:
        self.waiting: deque[Sequence[Any]] = deque()

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return self

    def __next__(self) -> Sequence[Any]:
        if not self.waiting:
            raise StopIteration
        return self.waiting.popleft()
