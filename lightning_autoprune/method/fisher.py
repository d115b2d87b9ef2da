"""What the dense phase measures of each weight: the mean square of its gradient. Torch only.

That mean is the diagonal of the empirical Fisher information, over batches. By Optimal Brain Damage (LeCun, Denker and
Solla, 1990), removing a weight costs about ½ · w² · H, and the Fisher information F stands in for the curvature H. With
few gradients F is noisy, and far from w the quadratic no longer holds, so that the magnitude alone is often the better
guide. The score here is the geometric mean of the two, abs(w) and abs(w) · √F (see :func:`saliency`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.sharding import gather_whole, local_shard, shard_like

__all__ = ["FisherInformation", "saliency"]

_LEAST_SHARE = 1e-3  # of the mean F, added to each F: weights without a gradient keep the order of their magnitudes


class FisherInformation:
    """The mean square of each weight's gradient so far: the diagonal of the empirical Fisher information.

    Tensors are shards where the weights are sharded.

    Example:
        >>> import torch
        >>> fisher = FisherInformation()
        >>> fisher.add({"layer": torch.tensor([1.0, 3.0])})
        >>> fisher.add({"layer": torch.tensor([1.0, 1.0])})
        >>> fisher.of("layer", torch.zeros(2))
        tensor([1., 5.])
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Add one gradient of some layers; entries whose square is not finite count as 0."""
        for name, gradient in gradients.items():
            square = at_least_float32(gradient).square().nan_to_num_(nan=0.0, posinf=0.0)
            total = self._sums.get(name)
            if total is None or total.shape != square.shape:
                self._sums[name], self._counts[name] = square, 1
            else:
                self._sums[name] = square.add_(total.to(square.device))
                self._counts[name] += 1

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the mean square of a layer's gradients, in the shape of its (local) weight; None if there was none."""
        total = self._sums.get(name)
        if total is None or total.shape != local_shard(weight).shape:
            return None
        return total.to(weight.device) / self._counts[name]

    def clear(self) -> None:
        """Forget all gradients."""
        self._sums, self._counts = {}, {}

    def state_dict(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what resuming needs: sums over whole layers, and counts."""
        names = [name for name in weights if self.of(name, weights[name]) is not None]
        sums = {name: gather_whole(self._sums[name], weights[name]).clone() for name in names}
        return {"sums": sums, "counts": {name: self._counts[name] for name in names}}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` gave, for the layers that are still there in the same shape."""
        self.clear()
        for name, whole in state["sums"].items():
            if name in weights and whole.shape == weights[name].shape:
                self._sums[name] = shard_like(whole.to(local_shard(weights[name]).device), weights[name]).clone()
                self._counts[name] = state["counts"][name]


def saliency(T: Tensor, F: Tensor, mean_F: float) -> Tensor:
    """Return abs(w) · ⁴√F: the geometric mean of the magnitude abs(w) and of abs(w) · √F.

    Args:
        T: weights, of any shape.
        F: the mean square of each weight's gradient, in the same shape.
        mean_F: the mean of F over all layers, of which a thousandth is added to each F.

    Returns:
        A new tensor of that shape, in at least float32.

    Example:
        >>> import torch
        >>> saliency(torch.tensor([-2.0, 2.0]), torch.tensor([1.0, 16.0]), mean_F=0.0)
        tensor([2., 4.])
    """
    return at_least_float32(T).abs() * (F + _LEAST_SHARE * mean_F).sqrt_().sqrt_()
