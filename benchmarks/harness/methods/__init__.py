"""The methods by name. Each is made from the compression to reach, the seed and its own options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..training import Method
from .autoprune import AutoPrune
from .magnitude import GradualMagnitude

METHODS: dict[str, Callable[..., Method]] = {
    "dense": lambda compression, seed: Method(),
    "autoprune": AutoPrune,
    "autoprune-train": lambda compression, seed, **options: AutoPrune(compression, seed, held_out="train", **options),
    "gmp": lambda compression, seed, **options: GradualMagnitude(compression, **options),
}
