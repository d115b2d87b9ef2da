"""The masks of two saved models, compared: which weights both keep, and which were pruned or came back in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_autoprune.errors import AutoPruneError

__all__ = ["LayerComparison", "compare_masks", "format_comparison_table"]


@dataclass(frozen=True)
class LayerComparison:
    """The masks of one layer in two models.

    Attributes:
        name: name of the layer.
        weights: number of its weights.
        kept: number of weights that are not 0 in the first model.
        kept_after: number of weights that are not 0 in the second model.
        both: number of weights that are not 0 in both models.
    """

    name: str
    weights: int
    kept: int
    kept_after: int
    both: int

    @property
    def pruned(self) -> int:
        """Number of weights that are kept in the first model but not in the second."""
        return self.kept - self.both

    @property
    def revived(self) -> int:
        """Number of weights that are kept in the second model but not in the first."""
        return self.kept_after - self.both

    @property
    def overlap(self) -> float:
        """Intersection over union of the kept weights, in [0, 1]; 1 if neither model keeps any."""
        either = self.kept + self.kept_after - self.both
        return self.both / either if either else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, for JSON."""
        return {**asdict(self), "pruned": self.pruned, "revived": self.revived, "overlap": self.overlap}


def compare_masks(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[LayerComparison]:
    """Compare the masks of the layers that have the same name and shape in two models.

    Args:
        first: each layer's weight in the first model, by layer name.
        second: each layer's weight in the second model, or in the same model at a later time.

    Returns:
        One row per shared layer, and then their sum under the name ``"all"``.

    Raises:
        AutoPruneError: if they share no layer; it lists the layers of both.

    Example:
        >>> import torch
        >>> row, _ = compare_masks({"a": torch.tensor([1.0, 1.0, 0.0])}, {"a": torch.tensor([2.0, 0.0, 3.0])})
        >>> row.both, row.pruned, row.revived, round(row.overlap, 3)
        (1, 1, 1, 0.333)
    """
    rows = []
    for name, weight in first.items():
        other = second.get(name)
        if other is not None and other.shape == weight.shape:
            kept, kept_after = weight != 0, other != 0
            counts = [int(mask.sum()) for mask in (kept, kept_after, kept & kept_after)]
            rows.append(LayerComparison(name, weight.numel(), *counts))
    if not rows:
        raise AutoPruneError(
            f"No layer has the same name and shape in both. The first has {_list_shapes(first)}. The second has"
            f" {_list_shapes(second)}."
        )
    columns = zip(*((row.weights, row.kept, row.kept_after, row.both) for row in rows), strict=True)
    return [*rows, LayerComparison("all", *map(sum, columns))]


def format_comparison_table(rows: Iterable[LayerComparison]) -> tuple[list[str], list[list[str]]]:
    """Return the table's head and its rows of cells as text."""
    head = ["layer", "weights", "kept in A", "kept in B", "in both", "pruned", "revived", "overlap"]
    cells = [
        [
            row.name,
            f"{row.weights:,}",
            f"{row.kept:,}",
            f"{row.kept_after:,}",
            f"{row.both:,}",
            f"{row.pruned:,}",
            f"{row.revived:,}",
            f"{row.overlap:.2%}",
        ]
        for row in rows
    ]
    return head, cells


def _list_shapes(weights: Mapping[str, Tensor]) -> str:
    return "; ".join(f"{name} {tuple(weight.shape)}" for name, weight in weights.items())
