"""The pull: an L1 penalty on W until the masks are final, on layers whose scale does not matter. Torch only.

At a minimum of the loss, the gradient of each weight is noise around 0, and so is the sensitivity dL/dT · w that M
follows. With the penalty λ · abs(w), the loss pays for each weight there: dL/dw is about -λ · sgn(w), and the
sensitivity about -λ · abs(w). Weights that the loss does not pay for shrink before they are pruned, and others take
over.

The penalty also makes the weights of a layer smaller as a whole. Where a normalization follows, such as BatchNorm, the
loss does not depend on their scale. Elsewhere the penalty makes the network itself worse (docs/settings.md), so such
layers are left alone. The loss does not depend on the scale of a layer if the sum of dL/dw · w over its weights is 0
(Euler's theorem on homogeneous functions), which the first steps show.

Spred (Ziyin and Wang, "spred: Solving L1 Penalty with SGD", 2023) prunes by such a penalty alone.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.method.masked_weights import fetch_numbers
from lightning_autoprune.method.placement import placement_of
from lightning_autoprune.method.update_rules import GradientScale
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["Pull"]

_MEASURED_STEPS = 20  # in which the gradients show whether a layer's scale matters

_DECAY = 0.99  # of the mean square of the gradients

_LARGEST = 1e-3  # mean of n · cos² in these steps where it does not: rounding and the eps of the normalization


class Pull:
    """Adds λ · sgn(w) to the gradients of the layers whose scale the loss does not depend on.

    λ = strength / density · root mean square of the gradients of all prunable weights that an optimizer trains, with
    the density that is to be reached. The gradient of a pruned weight counts as 0.

    A layer is measured in its first 20 steps. Let cos be the cosine between its n weights and their gradients. Then
    n · cos² is 0 where the scale does not matter, and 1 on average for random directions.

    Args:
        strength: >= 0; 0: nothing is done.
        density: the fraction of weights to keep, in (0, 1].

    Example:
        >>> pull, weight = Pull(strength=0.1, density=0.2), torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> for _ in range(21):
        ...     weight.grad = torch.tensor([4.0, 3.0])  # orthogonal to the weights
        ...     pull.add_to_gradients({"layer": weight})
        >>> round(float(weight.grad[0]), 2), round(float(weight.grad[1]), 2)  # λ = 0.5 · √(25 / 2)
        (5.77, 1.23)
    """

    def __init__(self, strength: float, density: float) -> None:
        self._strength = strength / density
        self._sums: dict[str, float] = {}  # of n · cos²
        self._counts: dict[str, int] = {}  # of measured steps
        self._scales: dict[str, GradientScale] = {}  # by the first layer that an optimizer trains

    def add_to_gradients(
        self, weights: Mapping[str, Tensor], stepped: Container[int] | None = None, gradient_scale: float = 1.0
    ) -> None:
        """Measure the layers, or add the pull to their gradients, in place. Gradients of pruned weights must be 0.

        Args:
            weights: all prunable weights, by layer name; sharded ones on all ranks.
            stepped: the ``id`` of each parameter that the coming step trains; None: all of them.
            gradient_scale: the factor of a gradient scaler that is still in the gradients.
        """
        if not self._strength:
            return
        gradients = {
            name: local_shard(weight.grad)
            for name, weight in weights.items()
            if weight.grad is not None and (stepped is None or id(weight) in stepped)
        }
        new = [name for name in gradients if self._counts.get(name, 0) < _MEASURED_STEPS]
        pulled = [name for name in gradients if name not in new and self._sums[name] < _LARGEST * self._counts[name]]
        if new:
            self._measure({name: weights[name] for name in new}, gradients)
        if pulled:
            self._add({name: weights[name] for name in pulled}, gradients, gradient_scale)

    def _measure(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        sums = []
        for name, weight in weights.items():
            w, g = at_least_float32(local_shard(weight.detach())), at_least_float32(gradients[name])
            sums += [(w * g).sum(), w.square().sum(), g.square().sum()]
        numbers = placement_of(weights.values()).sum(fetch_numbers(sums))
        for (name, weight), wg, ww, gg in zip(weights.items(), numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            if math.isfinite(wg) and 0 < ww * gg < math.inf:  # else a gradient scaler skips the step, or no loss had it
                self._sums[name] = self._sums.get(name, 0.0) + weight.numel() * wg * wg / (ww * gg)
                self._counts[name] = self._counts.get(name, 0) + 1

    def _add(self, pulled: Mapping[str, Tensor], gradients: Mapping[str, Tensor], gradient_scale: float) -> None:
        norms = fetch_numbers([torch.linalg.vector_norm(at_least_float32(gradient)) for gradient in gradients.values()])
        sums = [
            math.fsum((norm / gradient_scale) ** 2 for norm in norms),
            float(sum(map(Tensor.numel, gradients.values()))),
        ]
        square, count = placement_of(pulled.values()).sum(sums)
        if not math.isfinite(square):
            return
        scale = self._scales.setdefault(next(iter(gradients)), GradientScale(_DECAY))
        factor = self._strength * scale.update(square / count) * gradient_scale
        for name, weight in pulled.items():
            gradients[name].add_(local_shard(weight.detach()).sign(), alpha=factor)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        scales = {name: (scale.mean_square, scale.updates) for name, scale in self._scales.items()}
        return {"sums": dict(self._sums), "counts": dict(self._counts), "scales": scales}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._scales = {name: GradientScale(_DECAY, *scale) for name, scale in state["scales"].items()}
