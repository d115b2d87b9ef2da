"""The pictures that loggers share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_utilities.core.rank_zero import WarningCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning_autoprune.reporting.plots import sparsity_heatmap
from lightning_autoprune.reporting.run_history import RunHistory

__all__ = ["_can_draw", "_heatmap", "_once"]

_once = WarningCache()


def _heatmap(history: RunHistory) -> Figure | None:
    return sparsity_heatmap(history.curves) if _can_draw() and history.curves else None


def _can_draw() -> bool:
    """Whether matplotlib is there; the figures that need it are left out without."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _once.warn(
            "The loggers get the figures of the pruning without its pictures, which need matplotlib: pip install"
            " 'lightning-autoprune[plots]'."
        )
        return False
    return True
