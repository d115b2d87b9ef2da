"""The figures of a run, and the base class of what writes them to a logger.

To support another logger, write a module with a subclass of :class:`FigureWriter`, and add it to ``WRITERS`` in
``figures``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from lightning_utilities.core.rank_zero import WarningCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning_autoprune.reporting.layer_table import LayerSummary
from lightning_autoprune.reporting.metric_names import loggable_names
from lightning_autoprune.reporting.plots import metric_path, sparsity_heatmap
from lightning_autoprune.reporting.run_history import Histogram, RunHistory
from lightning_autoprune.training.lightning_package import Logger

__all__ = ["LAYERS", "PATH", "SPARSITY_MAP", "FigureWriter", "RunFigures"]

_LoggerT = TypeVar("_LoggerT", bound=Logger)

LAYERS, SPARSITY_MAP, PATH = "layers", "sparsity_map", "path"  # names of figures; a histogram is "m/<layer>"

_warnings = WarningCache()


@dataclass(frozen=True)
class RunFigures:
    """Everything that loggers can get of a run. Pictures are drawn only for a writer that asks for them.

    They are not shared between writers: matplotlib moves the parts of a figure a little each time that it is rendered.

    Attributes:
        step: number of training steps that are over.
        layers: one row per layer.
        history: the run so far.
        best: best values of the followed metric by name, once fitting has ended; None before.
    """

    step: int
    layers: Sequence[LayerSummary]
    history: RunHistory
    best: Mapping[str, float] | None = None

    @property
    def histograms(self) -> dict[str, Histogram]:
        """The distribution of M in a few layers, by the figure's name."""
        names = loggable_names(layer.name for layer in self.layers)
        return {f"m/{names[layer]}": histogram for layer, histogram in self.history.histograms.items()}

    @property
    def path(self) -> list[tuple[float, float]]:
        """The pairs (sparsity, value of the followed metric), in order; empty if no metric is followed."""
        return [(sparsity, value) for _, sparsity, value in self.history.points] if self.history.metric else []

    def draw_sparsity_map(self) -> Figure | None:
        """Draw the sparsity of layers × steps; None before anything was logged, or if matplotlib is missing."""
        return sparsity_heatmap(self.history.curves) if _can_draw() and self.history.curves else None

    def draw_path(self) -> Figure | None:
        """Draw :attr:`path`; None if that is empty, or if matplotlib is missing."""
        metric = self.history.metric
        return metric_path(self.path, metric) if metric and self.path and _can_draw() else None


def _can_draw() -> bool:
    """Return True if matplotlib is installed; warn once if it is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        _warnings.warn(
            "The loggers get the figures of the pruning without its pictures, which need matplotlib: pip install"
            " 'lightning-autoprune[plots]'."
        )
        return False
    return True


class FigureWriter(ABC, Generic[_LoggerT]):
    """Writes the figures of a run to one kind of logger."""

    @abstractmethod
    def log(self, logger: _LoggerT, figures: RunFigures) -> None:
        """Write what the logger can take; an error becomes a warning, and training goes on.

        Args:
            logger: the logger, on the first process.
            figures: the figures of the run so far.
        """
