"""The index lists that a loader draws from its batch sampler, which may be split on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from lightning_autoprune.training.held_out.overriding import override

__all__ = ["IndexLists"]


class IndexLists:
    """The index lists of one pass over a loader.

    Workers draw lists before training starts, when it is not known yet which are to be split. These are recorded, and
    can be drawn again.

    Args:
        source: the iterator of the user's batch sampler.

    Attributes:
        source: the same.
        change: called with each list that is drawn; returns the one that the loader gets. None: lists are recorded.
        recorded: the lists that were drawn while there was no ``change``.

    Example:
        >>> lists = IndexLists(iter([[0, 1], [2, 3], [4, 5]]))
        >>> lists.peek(), next(lists), lists.recorded
        ([0, 1], [0, 1], [[0, 1]])
        >>> lists.change = lambda indices: indices[:1]
        >>> lists.draw_again(0)
        >>> [*lists]
        [[0], [2], [4]]
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self._waiting: deque[Any] = deque()
        self.change: Callable[[Any], Any] | None = None
        self.recorded: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        indices = self._waiting.popleft() if self._waiting else next(self.source)
        if self.change:
            return self.change(indices)
        self.recorded.append(indices)
        return indices

    def as_iterator(self) -> Iterator[Any]:
        """Return what the loader is to iterate over: with the attributes of the user's iterator, such as its state."""
        return override(self.source, __next__=self.__next__) or self

    def peek(self) -> Any:
        """Return the first list that is or will be drawn.

        Raises:
            StopIteration: if there is none.
        """
        if self.recorded:
            return self.recorded[0]
        if not self._waiting:
            self._waiting.append(next(self.source))
        return self._waiting[0]

    def draw_again(self, start: int) -> None:
        """Give out the recorded lists once more, from the one at ``start``."""
        self._waiting.extendleft(reversed(self.recorded[start:]))
        self.recorded = []
