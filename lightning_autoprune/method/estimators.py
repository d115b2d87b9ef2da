"""Straight-through estimators: what stands in for the derivative of the hard step h(m). Torch only.

The step h(m) = 1 for m > 0, else 0 has the derivative 0 almost everywhere, so no gradient would ever reach m. A
straight-through estimator (Bengio et al., 2013) puts h'(m) in its place.

To add an estimator, write a function here and give it a name in :data:`ESTIMATORS` and :data:`EstimatorName`. Users can
pass a function of their own to ``estimator=``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.registry import describe, describe_result, look_up

__all__ = ["ESTIMATORS", "Estimator", "EstimatorName", "check_estimator", "straight_through"]

EstimatorName = Literal["linear", "hard_sigmoid", "leaky_relu", "softplus"]

Estimator: TypeAlias = Callable[[Tensor], Tensor | None]
"""A user's own h'(m), elementwise: takes entries of M, returns a tensor of that shape, or None for 1 everywhere."""


def _linear(M: Tensor, leaky_slope: float) -> None:
    """h'(m) = 1. Returns None, because multiplying by 1 would only cost time."""


def _hard_sigmoid(M: Tensor, leaky_slope: float) -> Tensor:
    """h'(m) = 1/2 for abs(m) < 1, else 0."""
    return (M.abs() < 1).to(M.dtype).mul_(0.5)


def _leaky_relu(M: Tensor, leaky_slope: float) -> Tensor:
    """h'(m) = 1 for m > 0, else the slope."""
    return torch.where(M > 0, 1.0, leaky_slope).to(M.dtype)


def _softplus(M: Tensor, leaky_slope: float) -> Tensor:
    """h'(m) = sigmoid(m)."""
    return torch.sigmoid(M)


ESTIMATORS: Mapping[str, Callable[[Tensor, float], Tensor | None]] = {
    "linear": _linear,
    "hard_sigmoid": _hard_sigmoid,
    "leaky_relu": _leaky_relu,
    "softplus": _softplus,
}


def straight_through(estimator: EstimatorName | Estimator, M: Tensor, leaky_slope: float = 0.1) -> Tensor | None:
    r"""Return the straight-through derivative h'(m) of the indicator.

    ================ ================================= ==============================================
    name             h'(m)                             note
    ================ ================================= ==============================================
    ``linear``       1                                 the default; every weight can return
    ``hard_sigmoid`` 1/2 for \|m\| < 1, else 0         a weight with m <= -1 can never return
    ``leaky_relu``   1 for m > 0, else ``leaky_slope`` every weight can return; the paper's proposal
    ``softplus``     sigmoid(m)                        every weight can return; the paper's proposal
    ================ ================================= ==============================================

    Args:
        estimator: a name in :data:`ESTIMATORS`, or a function of M.
        M: auxiliary parameters, any shape.
        leaky_slope: h'(m) of ``leaky_relu`` for m <= 0, in [0, 1].

    Returns:
        h'(M) in the shape of ``M``; None where it is 1 everywhere.

    Raises:
        AutoPruneError: for an unknown name; lists the allowed names.

    Source:
        Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, section 3.

    Example:
        >>> straight_through("leaky_relu", torch.tensor([-2.0, 0.5]), leaky_slope=0.25)
        tensor([0.2500, 1.0000])
        >>> straight_through(lambda M: torch.exp(-M.abs()), torch.tensor([0.0]))
        tensor([1.])
    """
    if callable(estimator):
        return estimator(M)
    return look_up("estimator", estimator, ESTIMATORS, objects="a function of M")(M, leaky_slope)


def check_estimator(estimator: EstimatorName | Estimator) -> None:
    """Raise unless an estimator returns finite numbers in the shape of M, or None, and leaves M unchanged.

    Raises:
        AutoPruneError: for an unknown name, or a function that does anything else.
    """
    M = torch.linspace(-2, 2, 6).view(2, 3)
    given = M.clone()
    try:
        slope = straight_through(estimator, given)
    except AutoPruneError:
        raise
    except Exception as error:
        raise AutoPruneError(
            f"`estimator` {describe(estimator)} could not be called with M: {type(error).__name__}: {error}"
        ) from error
    if not torch.equal(given, M):
        raise AutoPruneError(f"`estimator` {describe(estimator)} writes to M; it must return a new tensor.")
    if slope is None:
        return
    if not isinstance(slope, Tensor) or slope.shape != M.shape or slope.is_complex() or not slope.isfinite().all():
        raise AutoPruneError(
            f"`estimator` {describe(estimator)} returned {describe_result(slope)} for an M of shape"
            f" {tuple(M.shape)}; it must return finite numbers in the shape of M, or None for 1 everywhere."
        )
