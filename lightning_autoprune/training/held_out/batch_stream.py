"""An endless stream of batches from a loader, whose position can be saved. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import isolated_random

__all__ = ["HeldOutBatches", "empty_loader_error", "find_generators", "with_private_iterator"]

_END = object()


class HeldOutBatches:
    """An endless stream of batches from a loader, whose position can be saved and restored.

    Each batch is drawn with isolated random numbers. The user's random numbers are therefore untouched, and a restored
    stream goes on as if it had never stopped.

    Args:
        loader: an iterable of batches that can be iterated over again and again.
        seed: together with the number of the pass, it decides the order of the batches.
        generators: generators that the loader draws from, besides the global ones.

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
                batch = next(self._iterator, _END)
            if batch is not _END:
                self.position += 1
                return batch
            self.passes, self.position, self._iterator = self.passes + 1, 0, None
        raise empty_loader_error()

    def close(self) -> None:
        """Drop the loader's iterator, and with it its worker processes; the position stays."""
        self._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Return the number of completed passes, and of batches drawn in the current one."""
        return {"passes": self.passes, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to a saved position; the batches of the pass that come before it are read again."""
        self.passes, self.position, self._iterator = state["passes"], 0, None
        while self.position < state["position"]:
            next(self)


def with_private_iterator(loader: Any) -> Any:
    """Return the loader, or a copy whose iterator nobody else uses.

    A ``DataLoader`` with persistent workers has only one iterator, which the training loop may be using.
    """
    if isinstance(loader, DataLoader):
        loader = copy(loader)
        loader._iterator = None
    return loader


def find_generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators that loaders and their samplers draw from, each once."""
    generators: dict[int, torch.Generator] = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for owner in (loader, *samplers):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[id(generator)] = generator
    return list(generators.values())


def empty_loader_error() -> AutoPruneError:
    """Return the error for a held-out loader without batches."""
    return AutoPruneError("The held-out loader gives no batches: it is empty, or `drop_last` leaves nothing.")
