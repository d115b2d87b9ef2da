"""The methods by name. Each takes the compression to reach, the seed and its own options."""

from __future__ import annotations

from collections.abc import Callable

from ..training import Method
from .autoprune import AutoPrune
from .dynamic import DynamicSparse
from .hyperflux import Hyperflux
from .l0 import L0
from .lightning_pruning import LightningPruning
from .magnitude import GradualMagnitude
from .nncf_rb import NNCFRegularized
from .paper import Paper
from .spred import Spred
from .vardrop import VariationalDropout
from .variants import Variant

METHODS: dict[str, Callable[..., Method]] = {
    "dense": lambda compression, seed: Method(),
    "autoprune": AutoPrune,
    "autoprune-train": lambda compression, seed, **options: AutoPrune(compression, seed, held_out="train", **options),
    "variant": Variant,
    "paper": Paper,
    "gmp": lambda compression, seed, **options: GradualMagnitude(compression, **options),
    "lightning": lambda compression, seed, **options: LightningPruning(compression, **options),
    "rigl": lambda compression, seed, **options: DynamicSparse(compression, "gradient", seed=seed, **options),
    "set": lambda compression, seed, **options: DynamicSparse(compression, "random", seed=seed, **options),
    "hyperflux": lambda compression, seed, **options: Hyperflux(compression, **options),
    "l0": lambda compression, seed, **options: L0(compression, **options),
    "vardrop": lambda compression, seed, **options: VariationalDropout(compression, **options),
    "spred": lambda compression, seed, **options: Spred(compression, **options),
    "nncf": lambda compression, seed, **options: NNCFRegularized(compression, **options),
}

LABELS = {
    "autoprune": "AutoPruneCallback (default, held out)",
    "autoprune-train": 'AutoPruneCallback(held_out="train")',
    "gmp": "gradual magnitude pruning (own)",
    "lightning": "Lightning's ModelPruning",
    "rigl": "RigL (own)",
    "set": "SET (own)",
    "hyperflux": "Hyperflux (own)",
    "l0": "L0 hard concrete (own)",
    "vardrop": "sparse variational dropout (own)",
    "spred": "spred (own)",
    "nncf": "NNCF, RB sparsity",
}
"""Names in tables and pictures; "own" marks a minimal implementation of ours."""
