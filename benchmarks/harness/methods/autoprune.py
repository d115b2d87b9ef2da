"""Ours: the callback of this package, as it is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback

from ..training import Method


class AutoPrune(Method):
    """``AutoPruneCallback`` at the defaults, but for what is given.

    Args:
        compression: prunable weights / those to keep; None: no target.
        options: more arguments of the callback.
    """

    def __init__(self, compression: float | None, seed: int = 0, **options: Any) -> None:
        target = None if compression is None else 1 - 1 / compression
        self.callback = AutoPruneCallback(target_sparsity=target, seed=seed, **options)

    def callbacks(self) -> list[Callback]:
        """The package's callback, after this one."""
        return [self, self.callback]
