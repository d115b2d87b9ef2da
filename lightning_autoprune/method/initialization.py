"""The auxiliary parameters that pruning starts with. Torch only.

The paper does not say what m starts at. If m starts in proportion to how much a weight matters, those that matter least
are the first to go (``benchmarks/ablations.py`` compares this with an equal m for all weights).

To add a starting value, write a function here and give it a name in :data:`INITIAL_M` and :data:`InitialM`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_autoprune.errors import quote_names
from lightning_autoprune.method.registry import look_up
from lightning_autoprune.tensors.dtypes import at_least_float32

__all__ = ["INITIAL_M", "InitialM", "can_start", "initial_m", "starting_values", "warn_of_constant"]

InitialM = Literal["fisher", "magnitude", "constant"]


def _magnitude(magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    return magnitudes * (scale / unit)


def _constant(magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    return torch.full_like(magnitudes, scale)


INITIAL_M: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "fisher": _magnitude,  # of saliencies; of magnitudes where units of several weights have one m
    "magnitude": _magnitude,
    "constant": _constant,
}
"""Functions of magnitudes (>= 0, any shape), the unit to measure them in (a scalar tensor), and the scale of m."""


def starting_values(name: InitialM, magnitudes: Tensor, unit: Tensor, scale: float) -> Tensor:
    """Return the m to start with, given how large each weight, block or channel is.

    Args:
        name: ``"fisher"``, ``"magnitude"``: ``scale`` · magnitude / unit; ``"constant"``: ``scale``.
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
        T: the layer's weights, of any shape. If they are all 0 or not all finite, the result fails :func:`can_start`.
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


def can_start(m: Tensor) -> bool:
    """Return True if pruning can start with the m of a layer: all are finite, and not all weights start pruned."""
    return bool(m.isfinite().all() and (m > 0).any())


def warn_of_constant(layers: Collection[str]) -> None:
    """Warn of layers whose M starts at a constant because their weights give nothing better; none: no warning."""
    if layers:
        warnings.warn(
            f"The weights of {quote_names(layers)} are all 0, or some are not finite, so their magnitude does not say"
            ' which ones to keep: their M starts at `initial_scale`, as with `initial_m="constant"`. `exclude` layers'
            " that are not trained. If the loss is not finite either, the training has diverged.",
            stacklevel=2,
        )
