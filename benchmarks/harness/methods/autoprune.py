"""This package's callback, unchanged."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback

from ..training import Method


class AutoPrune(Method):
    """``AutoPruneCallback`` at its defaults, apart from the given options.

    Args:
        compression: prunable weights / weights to keep; None: no target.
        seed: of the held-out samples.
        options: further arguments of the callback.
    """

    def __init__(self, compression: float | None, seed: int = 0, **options: Any) -> None:
        target = None if compression is None else 1 - 1 / compression
        self.callback = AutoPruneCallback(target_sparsity=target, seed=seed, **options)

    def callbacks(self) -> list[Callback]:
        """Return this method and the package's callback."""
        return [self, self.callback]
