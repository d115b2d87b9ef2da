"""The auxiliary parameters that pruning starts with. Torch only.

The paper does not say what m starts at. If m starts in proportion to the weight's magnitude, small weights are the
first to go (``benchmarks/ablations.py`` compares this with an equal m for all weights).

To add a starting value, write a function here and give it a name in :data:`INITIAL_M` and :data:`InitialM`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.registry import look_up
from lightning_autoprune.tensors.dtypes import at_least_float32

__all__ = ["INITIAL_M", "InitialM", "check_finite", "check_weights", "initial_m", "starting_values"]

InitialM = Literal["magnitude", "constant"]


def _magnitude(magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    return magnitudes * (scale / unit)


def _constant(magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    return torch.full_like(magnitudes, scale)


INITIAL_M: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {"magnitude": _magnitude, "constant": _constant}
"""Functions of magnitudes (>= 0, any shape), the unit to measure them in (a scalar tensor), and the scale of m."""


def starting_values(name: InitialM, magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    """Return the m to start with, given how large each weight, block or channel is.

    Args:
        name: ``"magnitude"``: ``scale`` · magnitude / unit; ``"constant"``: ``scale``.
        magnitudes: of any shape, >= 0.
        unit: a scalar tensor, > 0.
        scale: size of the initial m, > 0.

    Raises:
        AutoPruneError: for an unknown name; lists the allowed names.

    Example:
        >>> starting_values("magnitude", torch.tensor([1.0, 4.0]), torch.tensor(2.0), scale=0.5)
        tensor([0.2500, 1.0000])
    """
    return look_up("initial_m", name, INITIAL_M)(magnitudes, unit, scale)


def initial_m(T: Tensor, name: InitialM, scale: float) -> Tensor:
    """Return the m that each weight of a layer starts with.

    Args:
        T: the layer's weights, of any shape, finite and not all 0.
        name: ``"magnitude"``: ``scale`` · abs(w) / std(w); ``"constant"``: ``scale``.
        scale: size of the initial m, > 0.

    Returns:
        A new tensor of that shape, in at least float32.

    Example:
        >>> initial_m(torch.tensor([-1.0, 3.0, 1.0]), "magnitude", 0.2)
        tensor([0.1000, 0.3000, 0.1000])
    """
    wide = at_least_float32(T)
    largest = wide.abs().max()
    std = wide.std() if wide.numel() > 1 else largest
    unit = torch.where(std > 1e-6 * largest, std, largest)  # equal weights have no spread
    return starting_values(name, wide.abs(), unit, scale)


def check_finite(layer: str, T: Tensor) -> None:
    """Raise if a layer has weights that are not finite.

    Raises:
        AutoPruneError: naming the layer.
    """
    if not T.isfinite().all():
        raise AutoPruneError(f"Layer {layer!r} has weights that are not finite: the training has diverged.")


def check_weights(layer: str, T: Tensor, name: InitialM) -> None:
    """Raise if a layer's weights give no M to start with.

    Args:
        layer: name of the layer.
        T: its weights.
        name: a name in :data:`INITIAL_M`.

    Raises:
        AutoPruneError: naming the layer, if weights are not finite, or if all are 0 and would all start pruned.
    """
    check_finite(layer, T)
    zero_starts_pruned = starting_values(name, torch.zeros(1), torch.ones(()), 1.0).item() <= 0
    if zero_starts_pruned and T.count_nonzero() == 0:
        raise AutoPruneError(
            f"All weights of layer {layer!r} are 0, so their magnitude does not say which ones to keep: start pruning"
            ' later (`warmup`), exclude the layer, or use `initial_m="constant"`.'
        )
