"""Random numbers apart from the user's, the same for the same seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["derive_seed", "isolated_random"]


@contextmanager
def isolated_random(*seeds: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Seeds torch, numpy and Python inside the block and puts their states back after it.

    Args:
        seeds: integers that together make the seed.
        generators: more generators of torch to treat the same.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with isolated_random(1, 2):
        ...     _ = torch.rand(3)
        >>> round(torch.rand(()).item(), 4)  # as if the block had not been
        0.4963
    """
    seed = derive_seed(*seeds)
    python, legacy, states = random.getstate(), np.random.get_state(), [g.get_state() for g in generators]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=devices):
            # not torch.manual_seed: without a GPU it keeps a stack trace a call, for ever, and takes milliseconds
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
    """One 63-bit seed out of several integers, the same on every machine (FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for seed in seeds:
        for byte in (seed % 2**64).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value >> 1
