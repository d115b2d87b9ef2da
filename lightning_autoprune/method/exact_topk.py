"""Which entries of M are the largest, exactly, without putting all in one place. Torch only.

For a threshold t a layer i keeps max(floorᵢ, nᵢ(t)) entries, with nᵢ(t) the number of its m >= t, as its floor and what
is above a threshold are both its largest ones. The sum over the layers falls as t grows, so the largest t for which it
is not below the count is found by bisection over the numbers that the type has, in one step a bit. Each step needs nᵢ
alone, which are summed up over the ranks where M is sharded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError

__all__ = ["check_count", "keep_largest", "lift_largest", "minimum_counts"]


def minimum_counts(totals: Sequence[int], layer_floor: float) -> list[int]:
    """Number of weights that each layer keeps whatever happens: a share of them, at least one."""
    return [max(1, math.ceil(layer_floor * total * (1 - 1e-12))) for total in totals]  # 0.07 · 100 is above 7


def check_count(count: int, totals: Sequence[int], layer_floor: float) -> None:
    """Raises unless ``count`` weights can be kept in layers of ``totals`` weights.

    Raises:
        AutoPruneError: naming the numbers, and what to change.
    """
    least, total = sum(minimum_counts(totals, layer_floor)), sum(totals)
    if not least <= count <= total:
        most = (total - least) * 10**6 // total / 10**6  # rounded down, so that it is possible
        raise AutoPruneError(
            f"Keeping {count} of {total} weights is not possible: with `layer_floor={layer_floor:g}` the"
            f" {len(totals)} layers keep at least {least}. Ask for a `target_sparsity` of at most {most:g}, or lower"
            " `layer_floor`."
        )


_BARELY_KEPT = 1e-8  # what m is lifted to where it must be kept: the first to go again


def keep_largest(
    M: Sequence[Tensor],
    floors: Sequence[int],
    count: int,
    *,
    prune: bool = True,
    over_ranks: Callable[[list[float]], list[float]] = list,
    before: Callable[[int], int] = lambda own: 0,
) -> None:
    """Moves the entries of M in place so that the ``count`` largest of all are kept, each tensor's floor first.

    Of equal entries the first ones are kept. NaN becomes -inf, the last to be kept.

    Args:
        M: auxiliary parameters, one tensor a layer, or this rank's part of it.
        floors: number of entries that each layer keeps whatever happens.
        count: number of entries to keep, at least the sum of ``floors``.
        prune: whether all others are pruned; otherwise they stay as they are.
        over_ranks: makes sums over this rank's parts those over whole layers.
        before: makes a number of this rank the sum of those of the ranks before it.

    Example:
        >>> M = [torch.tensor([0.3, 0.2]), torch.tensor([-5.0, -4.0])]
        >>> keep_largest(M, floors=[1, 1], count=2)
        >>> [(m > 0).tolist() for m in M]
        [[True, False], [False, True]]
    """

    def counts(compare: Callable[[Tensor, float], Tensor], t: float) -> list[int]:
        found = [float(torch.count_nonzero(compare(m, t))) for m in M]
        return [round(n) for n in over_ranks(found)]

    def kept(t: float) -> int:
        return sum(max(n, floor) for n, floor in zip(counts(torch.ge, t), floors, strict=True))

    for m in M:
        _without_nan_(m)
    t = _largest(lambda t: kept(t) >= count, double=any(m.dtype == torch.float64 for m in M))
    spare = kept(t) - count  # entries equal to t that are too many
    layers = list(zip(M, floors, counts(torch.ge, t), counts(torch.gt, t), strict=True))
    for m, floor, n, above in reversed(layers):
        if n < floor:
            keep_largest([m], [0], floor, prune=prune, over_ranks=over_ranks, before=before)
            continue
        dropped = min(spare, n - max(above, floor))
        spare -= dropped
        chosen = m >= t
        if dropped:
            equal = m == t
            place = torch.cumsum(equal.flatten(), 0).view(m.shape) + before(int(torch.count_nonzero(equal)))
            chosen &= ~equal | (place <= n - above - dropped)
        m.copy_(torch.where(chosen, m.clamp_min(_BARELY_KEPT), m.clamp_max(0) if prune else m))


def lift_largest(m: Tensor, count: int) -> None:
    """Moves the ``count`` largest entries of a tensor just above 0, in place, where they are not above it.

    NaN becomes -inf.

    Example:
        >>> m = torch.tensor([-3.0, -1.0, -2.0])
        >>> lift_largest(m, 1)
        >>> (m > 0).tolist()
        [False, True, False]
    """
    flat = _without_nan_(m).flatten()
    best = flat.topk(count).indices
    flat[best] = flat[best].clamp_min(_BARELY_KEPT)
    m.copy_(flat.view_as(m))


def _without_nan_(m: Tensor) -> Tensor:
    return m.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _largest(holds: Callable[[float], bool], *, double: bool) -> float:
    """The largest number of single or double precision for which something holds that holds below it."""
    real, whole, bits = ("<d", "<q", 63) if double else ("<f", "<i", 31)

    def order(x: float) -> int:
        """The place of a number among all there are; its bits, but that negative ones run the other way."""
        i: int = struct.unpack(whole, struct.pack(real, x))[0]
        return i if i >= 0 else i ^ (2**bits - 1)

    def number(i: int) -> float:
        return float(struct.unpack(real, struct.pack(whole, i if i >= 0 else i ^ (2**bits - 1)))[0])

    low, high = order(-math.inf), order(math.inf) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(number(middle)) else (low, middle)
    return number(low)
