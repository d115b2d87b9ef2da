"""Holds samples out of each batch before it is collated: a share of its indices goes to a second loader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune.tensors.random_state import isolated_random
from lightning_autoprune.training.held_out.batch_stream import find_generators
from lightning_autoprune.training.held_out.following_loader import FollowingLoader
from lightning_autoprune.training.held_out.held_out_source import HeldOutError, RunUnderWay
from lightning_autoprune.training.held_out.index_lists import IndexLists
from lightning_autoprune.training.held_out.overriding import override

__all__ = ["SampledBatches"]


class _HeldOutPart(NamedTuple):
    """Samples that were held out of a batch.

    Attributes:
        batch: number of the batch in its epoch.
        step: number of the training step that the batch ends.
        share: fraction of the samples of the batch, in (0, 1).
    """

    batch: int
    step: int
    share: float


class SampledBatches:
    """Splits the index lists of a map-style ``DataLoader`` before the batches are made.

    A list is split when the loader draws it, which workers do several batches ahead. The rest becomes the training
    batch as ever: by the loader's ``collate_fn``, in its workers, with the user's random numbers. The held-out indices
    go to a :class:`FollowingLoader`.

    Args:
        loader: the user's loader, which is not changed; see :meth:`can_split`.
        fraction: fraction of the samples that is held out, in (0, 1).
        seed: seed of the random numbers with which held-out samples are loaded.
        finish: see :class:`FollowingLoader`.

    Attributes:
        view: the loader for Lightning to iterate over; it has all attributes of the user's.
        following: loads the held-out batches.
    """

    def __init__(
        self, loader: DataLoader[Any], fraction: float, seed: int, finish: Callable[[Any], Any] | None = None
    ) -> None:
        self.loader, self.seed = loader, seed
        self.batch_sampler: Any = loader.batch_sampler
        self.following = FollowingLoader(loader, fraction, seed, finish)
        self.view = override(loader, __iter__=self._open)
        stand_in = override(self.batch_sampler, __iter__=self._draw)
        self._drawn_from = stand_in or _Lists(self.batch_sampler, self._draw)
        self._pass: _Pass | None = None  # the one that draws now
        self._held_out: deque[_HeldOutPart] = deque()  # from the batches on their way
        self._is_over = False
        self.run: RunUnderWay | None = None
        self._try_out: Callable[[Any], None] | None = None
        self._split: Callable[[Any, int], tuple[Any, Any] | None] | None = None

    @staticmethod
    def can_split(loader: Any) -> bool:
        """Return True if a loader makes its batches of index lists that can be told before."""
        return (
            isinstance(loader, DataLoader)
            and not isinstance(loader.dataset, IterableDataset)
            and loader.batch_sampler is not None
            and override(loader, __iter__=lambda: iter(())) is not None
        )

    def follow(
        self,
        run: RunUnderWay,
        try_out: Callable[[Any], None],
        split: Callable[[Any, int], tuple[Any, Any] | None],
    ) -> None:
        """Split the batches of a run.

        Args:
            run: the run.
            try_out: called once, before the first batch, with its indices; it may call :meth:`stop`.
            split: takes the indices of a batch and the number of the step that it ends; returns the indices to train on
                and those to hold out, or None if the batch is to stay whole.
        """
        self.run, self._try_out, self._split = run, try_out, split

    def stop(self) -> None:
        """Leave all batches whole from now on."""
        self.run = self._try_out = self._split = None
        self._is_over = True
        self._held_out.clear()
        self.following.close()

    def next_batch(self, batch: int) -> tuple[Any, float] | None:
        """Return the samples that were held out of a batch, and their share of it; None if it was trained on whole.

        Args:
            batch: number of the batch in its epoch.
        """
        while self._held_out and self._held_out[0].batch <= batch:
            part = self._held_out.popleft()
            loaded = self.following.next_batch(part.step)
            if part.batch == batch:
                return loaded, part.share
        return None

    # What a pass over the loader asks for

    def try_out(self, indices: Any) -> None:
        """Try the split on the first batch, given its indices."""
        if self._try_out:
            self._try_out(indices)

    def start_again(self) -> None:
        """Forget what was held out of the batches of an earlier pass."""
        self._held_out.clear()
        self.following.start_again()

    def split(self, indices: Any, batch: int, step: int) -> Any:
        """Return the indices to train on, and pass the others on.

        Args:
            indices: those of a batch.
            batch: its number in the epoch.
            step: number of the training step that it ends.
        """
        parts = self._split(indices, step) if self._split else None
        if parts is None:
            return indices
        rest, held_out = parts
        self._held_out.append(_HeldOutPart(batch, step, len(held_out) / (len(held_out) + len(rest))))
        self.following.add(held_out)
        return rest

    @contextmanager
    def drawn_from(self, under_way: _Pass) -> Iterator[None]:
        """Run a block in which the user's loader draws its lists from a pass."""
        attributes, self._pass = vars(self.loader), under_way
        attributes["batch_sampler"] = self._drawn_from
        try:
            yield
        finally:
            attributes["batch_sampler"], self._pass = self.batch_sampler, None

    def _open(self) -> Iterator[Any]:
        """Take the place of the loader's ``__iter__``."""
        return iter(self.loader) if self._is_over else _Pass(self)

    def _draw(self) -> Iterator[Any]:
        """Take the place of the batch sampler's ``__iter__``."""
        return self._pass.draw() if self._pass else iter(self.batch_sampler)


class _Lists:
    """Stands in for a batch sampler of a class that can't be derived from, such as a list of lists."""

    def __init__(self, lists: Any, draw: Callable[[], Iterator[Any]]) -> None:
        self._lists, self._draw = lists, draw

    def __len__(self) -> int:
        return len(self._lists)

    def __iter__(self) -> Iterator[Any]:
        return self._draw()


class _Split:
    """Splits the lists of a pass that are due, one after the other.

    Args:
        batches: what they are split for.
        batch: number in the epoch of the batch of the next list.
        step: number of the training step that this batch is for.
    """

    def __init__(self, batches: SampledBatches, batch: int, step: int) -> None:
        self._batches, self._batch, self._step = batches, batch, step

    def __call__(self, indices: Any) -> Any:
        """Return the indices to train on."""
        batch, step = self._batch, self.count()
        return indices if step is None else self._batches.split(indices, batch, step)

    def count(self) -> int | None:
        """Count a list; return the number of the training step that its batch ends, if an auxiliary step follows it."""
        run, step = self._batches.run, self._step
        if run is None:
            return None
        ends = run.ends_step(self._batch)
        self._batch += 1
        self._step += ends
        return step if ends and run.is_due(step) else None


class _Pass:
    """One pass over a loader, as the training loop iterates it.

    The first pass of a fit is opened before training starts, and only its first batch tells where in the epoch it is.
    If workers have drawn lists by then that are to be split, they draw them again.

    Nothing that lives longer than the loader's iterator refers to it: its workers end when the pass is dropped.

    Args:
        batches: what to iterate over.
    """

    def __init__(self, batches: SampledBatches) -> None:
        self._batches = batches
        self._lists: IndexLists | None = None
        self._draws_again = False
        self._given = 0  # batches
        self._split: _Split | None = None  # None: lists are recorded
        self._has_begun = batches.run is not None
        if batches.run:
            batches.start_again()
            self._split = _Split(batches, batches.run.next_batch_index(), batches.run.step())
        self._iterator = self._iterate()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        run = self._batches.run
        if self._has_begun or run is None:
            return self._next()
        self._has_begun, given = True, self._given
        early = [] if self._lists else [self._next()]  # a loader whose `__iter__` is a generator draws only now
        draws_again = self._begin(run, given)
        return self._next() if draws_again or not early else early[0]

    def __reduce__(self) -> tuple[Any, ...]:  # workers may be handed the Trainer, and with it this
        return iter, ((),)

    def draw(self) -> Iterator[Any]:
        """Return the index lists, for the loader."""
        if not self._draws_again or self._lists is None:
            self._lists = IndexLists(iter(self._batches.batch_sampler))
            self._lists.change = self._split
        return self._lists.as_iterator()

    def _iterate(self) -> Iterator[Any]:
        with self._batches.drawn_from(self):
            return iter(self._batches.loader)

    def _next(self) -> Any:
        with self._batches.drawn_from(self):
            batch = next(self._iterator)
        self._given += 1
        return batch

    def _begin(self, run: RunUnderWay, given: int) -> bool:
        """Try the split out, and split all lists from now on; return True if some are drawn again for this.

        Args:
            run: the run.
            given: number of batches that Lightning has, whose lists stay whole.
        """
        lists = self._lists
        if lists is None:
            kind = type(self._batches.loader).__name__
            run.stop_holding_out(HeldOutError(f"the loader, a {kind}, does not draw from its batch sampler"))
            return False
        try:
            first = lists.peek()
        except StopIteration:
            return False
        self._batches.try_out(first)
        batch, step = run.next_batch_index(), run.step()
        if self._skips_lists(lists):
            batch, step = 0, step - sum(map(run.ends_step, range(batch)))
        ahead = _Split(self._batches, batch, step)
        steps = [ahead.count() for _ in lists.recorded][given:]  # of the batches that are on their way
        draws_again = any(due is not None for due in steps)
        if draws_again:
            self._split = _Split(self._batches, batch, step)
            for _ in range(given):
                self._split.count()
            self._draw_again(lists, given)
        else:
            self._split = lists.change = ahead
        lists.recorded = []
        return draws_again

    def _skips_lists(self, lists: IndexLists) -> bool:
        """Return True if the loader, in the middle of an epoch, will skip the lists that it has used before."""
        is_restored = _is_stateful(self._batches.batch_sampler) or _is_stateful(lists.source)
        return _is_stateful(self._batches.loader) and not is_restored

    def _draw_again(self, lists: IndexLists, given: int) -> None:
        """Make the loader draw its lists again, from that of the first batch that Lightning does not have."""
        loader: Any = self._batches.loader
        with isolated_random(self._batches.seed, generators=find_generators([loader])):
            if _is_stateful(loader):
                loader.load_state_dict(loader.state_dict())
            else:
                lists.change = self._split
                lists.draw_again(given)
                self._draws_again = True
            self._iterator = self._iterate()


def _is_stateful(thing: Any) -> bool:
    return hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")
