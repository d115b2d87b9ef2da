"""Magnitude pruning, global over the layers: gradual (Zhu and Gupta, "To prune, or not to prune", 2017), or at once."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from .common import Masked, cubic_path, top_masks


class GradualMagnitude(Masked):
    """Keeps the weights of largest magnitude; their number falls to the target on a cubic.

    Args:
        compression: prunable weights / weights to keep.
        begin: fraction of the run after which pruning begins.
        end: fraction of the run after which the masks are final.
        every: number of steps from one pruning to the next.
    """

    def __init__(self, compression: float, begin: float = 0.05, end: float = 0.45, every: int = 100) -> None:
        super().__init__(compression, begin, end)
        self.every, self._masks_final = every, False

    def after_step(self) -> None:
        """Prune every ``every`` steps, and once more exactly when pruning ends."""
        last = self.progress == 1 and not self._masks_final
        if self.progress == 0 or self._masks_final or (self.step % self.every and not last):
            return
        self._masks_final = last
        keep = round(cubic_path(self.progress, self.total, self.target))
        self.masks = top_masks([weight.abs() for weight in self.weights], keep)


class OneShotMagnitude(Masked):
    """Keeps the weights of largest magnitude, chosen once, before the first step of a trained network's fine-tuning.

    Args:
        compression: prunable weights / weights to keep.
    """

    def __init__(self, compression: float) -> None:
        super().__init__(compression)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune to the target."""
        super().on_train_start(trainer, pl_module)
        self.masks = top_masks([weight.detach().abs() for weight in self.weights], self.target)
        self.apply()
