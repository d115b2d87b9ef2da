"""Random numbers that do not touch the user's, and that are the same for the same seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "isolated_random"]


@contextmanager
def isolated_random(*seeds: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Seed torch, NumPy and Python inside the block, and restore their states after it.

    Args:
        seeds: integers that are combined into one seed.
        generators: further torch generators to seed and restore.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with isolated_random(1, 2):
        ...     _ = torch.rand(3)
        >>> round(torch.rand(()).item(), 4)  # the same number as without the block
        0.4963
    """
    seed = derive_seed(*seeds)
    python, legacy, states = random.getstate(), np.random.get_state(), [g.get_state() for g in generators]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            # not torch.manual_seed: without a GPU each call keeps a stack trace forever, and takes milliseconds
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)


def derive_seed(*seeds: int) -> int:
    """Combine integers into one 63-bit seed, the same on every machine (FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for seed in seeds:
        for byte in (seed % 2**64).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value >> 1
