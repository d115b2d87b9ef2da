"""Held-out data: where the batches that train M come from. Torch only.

A part of the training set that is fixed for the run (:func:`split_loader`), or any loader (:class:`HeldOutBatches` runs
through it again and again). Parts of each training batch are in ``batches``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import isolated_random

__all__ = ["HeldOutBatches"]


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
                    self._iterator = iter(with_private_iterator(self.loader))
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


def with_private_iterator(loader: Any) -> Any:
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
