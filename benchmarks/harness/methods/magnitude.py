"""Gradual magnitude pruning (Zhu and Gupta, "To prune, or not to prune", 2017), global over the layers."""

from __future__ import annotations

from .common import Masked, cubic, top_masks


class GradualMagnitude(Masked):
    """Keeps the weights of largest magnitude; their number falls on a cubic from all to the target.

    Args:
        every: steps from one pruning to the next.
    """

    def __init__(self, compression: float, begin: float = 0.05, end: float = 0.45, every: int = 100) -> None:
        super().__init__(compression, begin, end)
        self.every, self._done = every, False

    def after_step(self) -> None:
        """Prunes every so many steps, and exactly when pruning ends."""
        last = self.progress == 1 and not self._done
        if self.progress == 0 or self._done or (self.step % self.every and not last):
            return
        self._done = last
        keep = round(cubic(self.progress, self.total, self.target))
        self.masks = top_masks([weight.abs() for weight in self.weights], keep)
