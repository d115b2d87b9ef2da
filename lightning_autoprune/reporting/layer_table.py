"""A table with one row per layer: its shape, how much of it is kept, and how many weights came back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_autoprune.tensors.sharding import is_sharded

__all__ = ["LayerSummary", "align_columns", "format_layer_table", "sum_layers", "summarize_layers"]


@dataclass(frozen=True)
class LayerSummary:
    """One layer's row in the table.

    Attributes:
        name: name of the layer.
        shape: shape of its weight.
        weights: number of its weights.
        kept: number of its weights that are not 0.
        flops: floating-point operations of the dense layer; None if unknown.
        revived: number of weights that came back after they had been pruned, counted from log to log; None if unknown.
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
        return (self.weights - self.kept) / self.weights if self.weights else 0.0

    @property
    def flops_kept(self) -> int | None:
        """Floating-point operations with weights that are not 0; None if unknown."""
        return None if self.flops is None else round(self.flops * (1 - self.sparsity))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, for a table or JSON."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity, "flops_kept": self.flops_kept}


def summarize_layers(
    weights: Mapping[str, Tensor],
    flops: Mapping[str, int] | None = None,
    revived: Mapping[str, int] | None = None,
    sparsity: Mapping[str, float] | None = None,
) -> list[LayerSummary]:
    """Count the zeros of each weight and return one row per layer.

    Args:
        weights: each layer's weight, of any shape, by layer name.
        flops: each dense layer's floating-point operations, by layer name.
        revived: number of each layer's weights that came back, by layer name.
        sparsity: fraction of zeros of each sharded weight, by layer name: one rank alone can't count them.

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


def sum_layers(rows: Sequence[LayerSummary]) -> LayerSummary:
    """Add up all rows into one, under the name ``"all"``; a figure that one row lacks is None in the sum."""
    flops, revived = [row.flops for row in rows], [row.revived for row in rows]
    return LayerSummary(
        "all",
        (),
        sum(row.weights for row in rows),
        sum(row.kept for row in rows),
        None if None in flops or not rows else sum(count for count in flops if count is not None),
        None if None in revived or not rows else sum(count for count in revived if count is not None),
    )


def format_layer_table(rows: Iterable[LayerSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the table's head and its rows of cells as text; leave out columns that are empty in every row."""
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
    """Return a table for a terminal: its first column aligned to the left, the others to the right.

    Example:
        >>> print(align_columns(["layer", "kept"], [["first", "1,000"]]))
        layer   kept
        first  1,000
    """
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = []
    for first, *others in [head, *cells]:
        aligned = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)
