"""The auxiliary parameters that pruning starts with. Torch only.

The paper does not say what m starts at. Where it carries the weight's magnitude, small weights are the first to go
(``benchmarks/ablations.py`` compares it with an m alike for all).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.update_rules import at_least_float32

__all__ = ["INITIAL_M", "InitialM", "check_values", "initial_m"]

InitialM = Literal["magnitude", "constant"]

INITIAL_M: tuple[InitialM, ...] = get_args(InitialM)


def initial_m(T: Tensor, initial: InitialM, scale: float) -> Tensor:
    """The m that a layer starts with.

    Args:
        T: its weights, of any shape, finite and not all 0.
        initial: ``"magnitude"``: ``scale`` · abs(w) / std(w); ``"constant"``: ``scale``.
        scale: size of the initial m, > 0.

    Returns:
        A new tensor of that shape, in at least float32.

    Example:
        >>> initial_m(torch.tensor([-1.0, 3.0, 1.0]), "magnitude", 0.2)
        tensor([0.1000, 0.3000, 0.1000])
    """
    wide = at_least_float32(T)
    if initial == "constant":
        return torch.full_like(wide, scale)
    largest = wide.abs().max()
    std = wide.std() if wide.numel() > 1 else largest
    return wide.abs() * (scale / torch.where(std > 1e-6 * largest, std, largest))  # equal weights have no spread


def check_values(name: str, T: Tensor, initial: InitialM) -> None:
    """Raises if a layer's weights give no M to start with.

    Raises:
        AutoPruneError: naming the layer, where weights are not finite, or where all are 0 and magnitude is to decide.
    """
    if not T.isfinite().all():
        raise AutoPruneError(f"Layer {name!r} has weights that are not finite: the training has diverged.")
    if initial == "magnitude" and T.count_nonzero() == 0:
        raise AutoPruneError(
            f"All weights of layer {name!r} are 0, so their magnitude says nothing of what to keep: start later"
            ' (`warmup`), exclude the layer, or use `initial_m="constant"`.'
        )
