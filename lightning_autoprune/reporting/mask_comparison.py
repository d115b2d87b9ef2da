"""Two saved models beside each other: which weights both keep, and which were pruned or came back between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from lightning_autoprune.errors import AutoPruneError

__all__ = ["LayerComparison", "as_comparison_table", "compare_masks"]


@dataclass(frozen=True)
class LayerComparison:
    """The masks of one layer in two models.

    Attributes:
        name: of the layer.
        weights: number of its weights.
        kept: number of those that are not 0 in the first.
        kept_after: in the second.
        both: in both.
    """

    name: str
    weights: int
    kept: int
    kept_after: int
    both: int

    @property
    def pruned(self) -> int:
        """Number of weights kept in the first and not in the second."""
        return self.kept - self.both

    @property
    def revived(self) -> int:
        """Number of weights kept in the second and not in the first."""
        return self.kept_after - self.both

    @property
    def overlap(self) -> float:
        """Intersection over union of the kept weights, in [0, 1]; 1 where none are kept."""
        either = self.kept + self.kept_after - self.both
        return self.both / either if either else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return {**asdict(self), "pruned": self.pruned, "revived": self.revived, "overlap": self.overlap}


def compare_masks(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[LayerComparison]:
    """Compares the masks of the layers that two models share, by name and shape.

    Args:
        first: weights by layer name.
        second: the same of another model, or of the same at another time.

    Returns:
        A row a layer, and one for all together under the name ``"all"``.

    Raises:
        AutoPruneError: if they share no layer; names what they have.

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
            kept, after = weight != 0, other != 0
            numbers = [int(mask.sum()) for mask in (kept, after, kept & after)]
            rows.append(LayerComparison(name, weight.numel(), *numbers))
    if not rows:
        one, two = ("; ".join(f"{name} {tuple(w.shape)}" for name, w in model.items()) for model in (first, second))
        raise AutoPruneError(f"No layer is in both with one shape. The first has {one}. The second has {two}.")
    columns = zip(*((row.weights, row.kept, row.kept_after, row.both) for row in rows), strict=True)
    return [*rows, LayerComparison("all", *map(sum, columns))]


def as_comparison_table(rows: Iterable[LayerComparison]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, as text."""
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
    return ["layer", "weights", "kept in A", "kept in B", "in both", "pruned", "revived", "overlap"], cells
