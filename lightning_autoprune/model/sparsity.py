"""Measure the sparsity of weights: as functions, and as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_autoprune.model.prunable_layers import choose_weights

__all__ = ["Sparsity", "layer_sparsity", "sparsity"]


def sparsity(weights: Tensor | Mapping[str, Tensor] | nn.Module) -> float:
    """Return the fraction of zeros in a weight, in several together, or in all prunable weights of a model.

    Args:
        weights: a tensor, tensors by name, or a module, whose :func:`prunable_weights` are counted, trained or not.

    Returns:
        The fraction of entries that are exactly 0, in [0, 1]; 0 if there are no entries.

    Example:
        >>> sparsity(torch.tensor([0.0, 1.0, 0.0, 2.0]))
        0.5
    """
    zeros, total = _count_zeros(weights)
    return zeros / total if total else 0.0


def layer_sparsity(model: nn.Module) -> dict[str, float]:
    """Return the fraction of zeros, in [0, 1], in each prunable weight of a model, by layer name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.fill_(0)
        >>> layer_sparsity(model)
        {'0': 1.0, '2': 0.0}
    """
    return {name: sparsity(weight) for name, weight in choose_weights(model).weights.items()}


class Sparsity(Metric):
    """Fraction of zeros over all weights given to ``update``, as a torchmetrics metric.

    ``update`` accepts what :func:`sparsity` accepts, and ``compute`` returns a scalar tensor in [0, 1]. Counts are
    summed over updates and over processes, and stay integers whatever ``set_dtype`` asks for.

    Example:
        >>> metric = Sparsity()
        >>> metric.update(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> metric.compute()
        tensor(0.7500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    if TYPE_CHECKING:  # TorchScript would take an annotation for the type itself, and it is a string here
        zeros: Tensor
        total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("zeros", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, weights: Tensor | Mapping[str, Tensor] | nn.Module) -> None:
        """Count the zeros in a tensor, in tensors by name, or in a model's prunable weights."""
        zeros, total = _count_zeros(weights)
        self.zeros += zeros
        self.total += total

    def compute(self) -> Tensor:
        """Return the fraction of zeros so far, a scalar in [0, 1]; 0 before any update."""
        return self.zeros / self.total.clamp_min(1)

    def set_dtype(self, dst_type: str | torch.dtype) -> Sparsity:
        """Return the metric unchanged: a count in another type would not be exact.

        Args:
            dst_type: has no effect.
        """
        return self

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value, or several values over steps; return the figure and the axes.

        Args:
            val: a result of ``compute`` or ``forward``, or a list of results; None: the result of ``compute``.
            ax: matplotlib axes to draw into; None: new axes.

        Example:
            >>> metric = Sparsity()
            >>> values = [metric(torch.tensor([0.0, 1.0])), metric(torch.zeros(4))]
            >>> figure, axes = metric.plot(values)  # doctest: +SKIP
        """
        return self._plot(val, ax)


def _count_zeros(weights: Tensor | Mapping[str, Tensor] | nn.Module) -> tuple[int, int]:
    """Return the number of zeros and the number of all entries."""
    if isinstance(weights, Tensor):
        return weights.numel() - int(torch.count_nonzero(weights)), weights.numel()
    named = choose_weights(weights).weights if isinstance(weights, nn.Module) else weights
    counts = [_count_zeros(weight) for weight in named.values()]
    return sum(zeros for zeros, _ in counts), sum(total for _, total in counts)
