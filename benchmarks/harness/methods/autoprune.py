"""Ours: the callback of this package, as it is."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_autoprune import AutoPruneCallback, pruner
from lightning_autoprune.pressure import target_path

from ..training import Method


class AutoPrune(Method):
    """``AutoPruneCallback`` at the defaults, but for what is given.

    Args:
        compression: prunable weights / those to keep; None: no target.
        power: of the path to the target (for an ablation; it is no setting of the callback).
        regrowth: share of the pruning phase, at its end, with no pressure (for an ablation).
        options: more arguments of the callback.
    """

    def __init__(
        self,
        compression: float | None,
        seed: int = 0,
        power: int | None = None,
        regrowth: float = 0.0,
        **options: Any,
    ) -> None:
        target = None if compression is None else 1 - 1 / compression
        self.power, self.regrowth = power, regrowth
        self.callback = AutoPruneCallback(target_sparsity=target, seed=seed, **options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the path of an ablation in place, or the package's own back."""
        path = functools.partial(target_path, power=self.power) if self.power else target_path
        if self.regrowth:  # beyond the target, then no pressure until the masks freeze
            path = functools.partial(_overshoot, regrowth=self.regrowth)
        pruner.target_path = path

    def callbacks(self) -> list[Callback]:
        """The package's callback."""
        return [self, self.callback]


def _overshoot(progress: float, start: float, target: float, regrowth: float) -> float:
    """To 0.8 of the target density, then so high that the controller takes the pressure away."""
    if progress > 1 - regrowth:
        return 1.0
    return target_path(progress / (1 - regrowth), start, 0.8 * target)
