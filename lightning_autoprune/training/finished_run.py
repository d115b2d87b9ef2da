"""What is known of a run from its saved state alone: it ended in another process, or a checkpoint has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_autoprune.reporting.layer_table import LayerSummary, sum_layers
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.tensors.bitmasks import unpack

__all__ = ["FinishedRun"]


class FinishedRun:
    """The figures of a run that is not under way in this process.

    Args:
        state: what ``PruningRun.state_dict`` gave.
        shapes: the shapes of the layers. None: those in the state, which has none in the dense phase.
    """

    def __init__(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.state = dict(state)
        self._auxiliary = state["pruner"]["auxiliary"]
        self._history = RunHistory.from_state_dict(state["report"]["history"])
        self._shapes = self._auxiliary["shapes"] if self._auxiliary else shapes or {}

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1]."""
        return sum_layers(self.layers()).sparsity

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """The pairs (step, sparsity) of the run, by layer name and ``"all"``."""
        return self._history.curves

    def layer_sparsity(self) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, by layer name."""
        return {row.name: row.sparsity for row in self.layers()}

    def layers(self) -> list[LayerSummary]:
        """Return a row for each layer."""
        revived = dict(zip(self._history.names, self._history.revived, strict=True))
        flops = self.state["flops"] or {}
        rows = []
        for i, (name, shape) in enumerate(self._shapes.items()):
            mask = unpack(self._auxiliary["masks"][i], shape) if self._auxiliary else None
            size = math.prod(shape)
            kept = size if mask is None else int(mask.sum())
            rows.append(LayerSummary(name, tuple(shape), size, kept, flops.get(name), revived.get(name)))
        return rows
