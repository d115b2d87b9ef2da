"""Straight-through estimators: what stands in for the derivative of the hard step h(m).

The step h(m) = 1 for m > 0, else 0 has the derivative 0 almost everywhere, so that no gradient would
ever reach m. A straight-through estimator (Bengio et al., 2013) puts h'(m) in its place. Torch only.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_autoprune.errors import check_choice

__all__ = ["ESTIMATORS", "Estimator", "straight_through"]

Estimator = Literal["linear", "hard_sigmoid", "leaky_relu", "softplus"]

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def straight_through(name: Estimator, M: Tensor, leaky_slope: float = 0.1) -> Tensor | None:
    r"""The straight-through derivative h'(m) of the indicator.

    ================ ================================= ==========================================
    name             h'(m)                             note
    ================ ================================= ==========================================
    ``linear``       1                                 the default; every weight can return
    ``hard_sigmoid`` 1/2 for \|m\| < 1, else 0         a weight with m <= -1 is dead for good
    ``leaky_relu``   1 for m > 0, else ``leaky_slope`` recoverable; the paper's proposal
    ``softplus``     sigmoid(m)                        recoverable, smooth; the paper's proposal
    ================ ================================= ==========================================

    Args:
        name: one of :data:`ESTIMATORS`.
        M: auxiliary parameters, any shape.
        leaky_slope: h'(m) of ``leaky_relu`` at m <= 0, in [0, 1].

    Returns:
        h'(M), shape and dtype of ``M``; None for ``linear``, where it is 1 everywhere and
        multiplying by it would only cost time.

    Raises:
        AutoPruneError: if ``name`` is unknown; lists the names there are.

    Source:
        Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, section 3.

    Example:
        >>> straight_through("leaky_relu", torch.tensor([-2.0, 0.5]), leaky_slope=0.25)
        tensor([0.2500, 1.0000])
    """
    check_choice("estimator", name, ESTIMATORS)
    if name == "linear":
        return None
    if name == "hard_sigmoid":
        return (M.abs() < 1).to(M.dtype).mul_(0.5)
    if name == "leaky_relu":
        return torch.where(M > 0, 1.0, leaky_slope).to(M.dtype)
    return torch.sigmoid(M)
