"""Random numbers that do not touch the user's, and that are the same for the same seeds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["derive_seed", "isolated_random", "preserve_random"]


@contextmanager
def preserve_random() -> Iterator[None]:
    """Restore the random states of Python, NumPy, torch and the accelerator after the block.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> with preserve_random():
        ...     _ = torch.rand(3)
        >>> round(torch.rand(()).item(), 4)  # the same number as without the block
        0.4963
    """
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = _accelerator()
    on_device = accelerator.get_rng_state() if accelerator else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if accelerator:
            accelerator.set_rng_state(on_device)


@contextmanager
def isolated_random(*seeds: int, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Seed Python, NumPy, torch and the accelerator inside the block, and restore their states after it.

    Args:
        seeds: integers that are combined into one seed.
        generators: further torch generators to seed and restore.

    Example:
        >>> with isolated_random(1, 2):
        ...     first = torch.rand(3)
        >>> with isolated_random(1, 2):
        ...     torch.equal(first, torch.rand(3))
        True
    """
    seed, states = derive_seed(*seeds), [generator.get_state() for generator in generators]
    try:
        with preserve_random():
            # not torch.manual_seed: without a GPU each call keeps a stack trace forever, and takes milliseconds
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
            if accelerator := _accelerator():
                seed_current = getattr(accelerator, "manual_seed", None) or accelerator.manual_seed_all
                seed_current(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _accelerator() -> Any:
    """Return torch's module of the accelerator (CUDA, MPS, XPU, …), whose random numbers may be in use; else None.

    Its functions work on the current device. torch supports one kind of accelerator per process.
    """
    try:
        module = torch.get_device_module()
    except RuntimeError:  # a backend of another package that has registered no module
        return None
    if not hasattr(module, "get_rng_state"):  # the CPU's
        return None
    # reading the state would start CUDA, which takes seconds and memory
    in_use = module.is_initialized() if hasattr(module, "is_initialized") else module.device_count() > 0
    return module if in_use else None


def derive_seed(*seeds: int) -> int:
    """Combine integers into one 63-bit seed, the same on every machine (FNV-1a over their bytes)."""
    value = 0xCBF29CE484222325
    for seed in seeds:
        for byte in (seed % 2**64).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value >> 1
