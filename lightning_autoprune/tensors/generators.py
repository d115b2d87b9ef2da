"""Random number generators that objects of the user keep for themselves. Torch and NumPy only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import MethodType
from typing import Any

import numpy as np
import torch

__all__ = ["preserve_generators"]

_MAX_DEPTH = 6  # a dataset in a subset, a list of transforms, a transform, its generator
_MAX_ITEMS = 100  # longer containers hold samples
_MAX_OBJECTS = 10_000  # an object may refer to the whole Trainer


@contextmanager
def preserve_generators(*owners: object) -> Iterator[None]:
    """Restore the states of generators in the attributes of some objects, and in the objects there, after the block.

    Generators of Python, NumPy and torch are found, a few levels deep. Containers of many items are left out.

    Example:
        >>> class Noisy:
        ...     def __init__(self):
        ...         self.random = random.Random(0)
        >>> noisy = Noisy()
        >>> with preserve_generators([noisy]):
        ...     first = noisy.random.random()
        >>> noisy.random.random() == first
        True
    """
    saved = [(generator, _state_of(generator)) for generator in _find(list(owners), _MAX_DEPTH, set())]
    try:
        yield
    finally:
        for generator, state in saved:
            _restore(generator, state)


def _find(thing: Any, depth: int, seen: set[int]) -> Iterator[Any]:
    if id(thing) in seen or depth < 0 or len(seen) > _MAX_OBJECTS:
        return
    seen.add(id(thing))
    if isinstance(thing, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
        yield thing
        return
    if isinstance(thing, (torch.Tensor, np.ndarray, type)):
        return
    if isinstance(thing, MethodType):
        parts = [thing.__self__]
    elif isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple)):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    if isinstance(thing, (dict, list, tuple)) and len(parts) > _MAX_ITEMS:
        return
    for part in parts:
        yield from _find(part, depth - 1, seen)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return deepcopy(generator.bit_generator.state)
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)
