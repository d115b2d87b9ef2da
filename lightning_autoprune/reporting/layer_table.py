"""A row for each layer: its shape, what is left of it, what that saves, and how much came back. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_autoprune.tensors.sharding import is_sharded

__all__ = ["LayerSummary", "align_columns", "summarize_layers", "table_cells", "total_row"]


@dataclass(frozen=True)
class LayerSummary:
    """What is left of a layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        weights: number of its weights.
        kept: number of those that are not 0.
        flops: floating-point operations with all its weights; None where that is not known.
        revived: number of weights that were pruned and came back, counted from log to log; None where not known.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    flops: int | None = None
    revived: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    @property
    def flops_kept(self) -> int | None:
        """Operations with weights that are not 0."""
        return None if self.flops is None else round(self.flops * (1 - self.sparsity))

    def as_dict(self) -> dict[str, Any]:
        """All figures by name, for a table or JSON."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity, "flops_kept": self.flops_kept}


def summarize_layers(
    weights: Mapping[str, Tensor],
    flops: Mapping[str, int] | None = None,
    revived: Mapping[str, int] | None = None,
    sparsity: Mapping[str, float] | None = None,
) -> list[LayerSummary]:
    """A row for each weight, whose zeros are counted.

    Args:
        weights: by layer name, of any shape.
        flops: operations of each dense layer, by name.
        revived: number of weights that came back, by name.
        sparsity: fraction of zeros, by name, of weights that are sharded, whose zeros one rank alone can't count.

    Example:
        >>> import torch
        >>> summarize_layers({"first": torch.tensor([[0.0, 1.0], [0.0, 0.0]])})
        [LayerSummary(name='first', shape=(2, 2), weights=4, kept=1, flops=None, revived=None)]
    """
    return [
        LayerSummary(
            name,
            tuple(weight.shape),
            weight.numel(),
            round((1 - (sparsity or {})[name]) * weight.numel()) if is_sharded(weight) else int(weight.count_nonzero()),
            (flops or {}).get(name),
            (revived or {}).get(name),
        )
        for name, weight in weights.items()
    ]


def total_row(rows: Sequence[LayerSummary]) -> LayerSummary:
    """All layers as one, under the name ``"all"``; what some of them don't know, it does not know."""
    flops, revived = [row.flops for row in rows], [row.revived for row in rows]
    return LayerSummary(
        "all",
        (),
        sum(row.weights for row in rows),
        sum(row.kept for row in rows),
        None if None in flops or not rows else sum(n for n in flops if n is not None),
        None if None in revived or not rows else sum(n for n in revived if n is not None),
    )


def table_cells(rows: Iterable[LayerSummary]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, as text; columns that no layer knows anything of are left out."""
    rows = list(rows)
    columns = {
        "layer": [row.name for row in rows],
        "shape": ["×".join(map(str, row.shape)) for row in rows],
        "weights": [f"{row.weights:,}" for row in rows],
        "kept": [f"{row.kept:,}" for row in rows],
        "sparsity": [f"{row.sparsity:.2%}" for row in rows],
        "FLOPs kept": ["" if row.flops_kept is None else f"{row.flops_kept:,}" for row in rows],
        "revived": ["" if row.revived is None else f"{row.revived:,}" for row in rows],
    }
    columns = {head: cells for head, cells in columns.items() if any(cells) or head in ("layer", "shape")}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def align_columns(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, the others to the right.

    Example:
        >>> print(align_columns(["layer", "kept"], [["first", "1,000"]]))
        layer   kept
        first  1,000
    """
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in [head, *cells])
    )
