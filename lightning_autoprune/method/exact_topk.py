"""Which entries of M are the largest, exactly, without gathering all of them in one place. Torch only.

For a threshold t, layer i keeps its largest max(floorᵢ, nᵢ(t)) entries, where nᵢ(t) is the number of its m >= t. The
sum over the layers falls as t grows. The largest t for which the sum is not below the wanted count is found by
bisection over the numbers that the dtype can represent, one step per bit. Each step needs only the counts nᵢ, which are
summed over the ranks where M is sharded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError

__all__ = ["check_count", "keep_largest", "largest_count", "lift_largest", "minimum_counts", "threshold_near"]

_MOST_BISECTIONS, _MOST_EXPANSIONS = 40, 50

_BARELY_KEPT = 1e-8  # an m that must be kept is raised to this, and is the first to be pruned again


def minimum_counts(totals: Sequence[int], layer_floor: float) -> list[int]:
    """Return the number of entries that each layer always keeps: the given fraction of them, but at least one.

    Example:
        >>> minimum_counts([10, 5000], layer_floor=0.001)
        [1, 5]
    """
    return [max(1, math.ceil(layer_floor * total * (1 - 1e-12))) for total in totals]  # 0.07 * 100 is above 7


def check_count(count: int, totals: Sequence[int], layer_floor: float) -> None:
    """Raise unless ``count`` weights can be kept in layers of ``totals`` weights.

    Raises:
        AutoPruneError: with the numbers, and what to change.
    """
    least, total = sum(minimum_counts(totals, layer_floor)), sum(totals)
    if not least <= count <= total:
        most = (total - least) * 10**6 // total / 10**6  # rounded down, so that it is possible
        raise AutoPruneError(
            f"Keeping {count} of {total} weights is not possible: with `layer_floor={layer_floor:g}` the"
            f" {len(totals)} layers keep at least {least}. Ask for a `target_sparsity` of at most {most:g}, or lower"
            " `layer_floor`."
        )


def keep_largest(
    M: Sequence[Tensor],
    floors: Sequence[int],
    count: int,
    *,
    prune: bool = True,
    sum_over_ranks: Callable[[list[float]], list[float]] = list,
    sum_over_lower_ranks: Callable[[int], int] = lambda own: 0,
) -> None:
    """Move the entries of M in place so that the ``count`` largest of all are kept, each tensor's floor first.

    Among equal entries the first ones are kept. NaN becomes -inf, the last to be kept.

    Args:
        M: auxiliary parameters, one tensor per layer, or this rank's shards of them.
        floors: number of entries that each layer always keeps.
        count: number of entries to keep, at least the sum of ``floors``.
        prune: whether all other entries are pruned; otherwise they stay unchanged.
        sum_over_ranks: turns counts in this rank's shards into counts in whole layers.
        sum_over_lower_ranks: turns this rank's count into the sum of the counts of the ranks before it.

    Example:
        >>> M = [torch.tensor([0.3, 0.2]), torch.tensor([-5.0, -4.0])]
        >>> keep_largest(M, floors=[1, 1], count=2)
        >>> [(m > 0).tolist() for m in M]
        [[True, False], [False, True]]
    """

    def counts(compare: Callable[[Tensor, float], Tensor], threshold: float) -> list[int]:
        """Return how many entries of each layer compare as true to a threshold."""
        mine = [float(torch.count_nonzero(compare(m, threshold))) for m in M]
        return [round(n) for n in sum_over_ranks(mine)]

    def total_kept(threshold: float) -> int:
        return sum(max(n, floor) for n, floor in zip(counts(torch.ge, threshold), floors, strict=True))

    for m in M:
        _replace_nan_(m)
    double = any(m.dtype == torch.float64 for m in M)
    t = _largest_number(lambda threshold: total_kept(threshold) >= count, double=double)
    surplus = total_kept(t) - count  # this many entries equal to t must go
    at_least, above = counts(torch.ge, t), counts(torch.gt, t)
    for m, floor, n, n_above in reversed(list(zip(M, floors, at_least, above, strict=True))):
        if n < floor:
            keep_largest(
                [m],
                [0],
                floor,
                prune=prune,
                sum_over_ranks=sum_over_ranks,
                sum_over_lower_ranks=sum_over_lower_ranks,
            )
            continue
        dropped = min(surplus, n - max(n_above, floor))
        surplus -= dropped
        kept = m >= t
        if dropped:
            equal = m == t
            first = sum_over_lower_ranks(int(torch.count_nonzero(equal)))
            place = torch.cumsum(equal.flatten(), 0).view(m.shape) + first  # among the entries equal to t, from 1
            kept &= ~equal | (place <= n - n_above - dropped)
        m.copy_(torch.where(kept, m.clamp_min(_BARELY_KEPT), m.clamp_max(0) if prune else m))


def threshold_near(
    M: Sequence[Tensor],
    count: int,
    tolerance: float = 0.002,
    sum_over_ranks: Callable[[list[float]], list[float]] = list,
) -> float:
    """Return a threshold above which nearly ``count`` entries of M lie.

    Bisection counts the entries above some ten thresholds, which is faster than a sort. All thresholds are the same
    however M is sharded. If equal entries leave no better choice, the number above the threshold is the nearest one
    that is possible.

    Args:
        M: auxiliary parameters, or this rank's shards of them. NaN lies above no threshold; if none has so many entries
            above it, 0 is returned.
        count: number of entries that should lie above the threshold.
        tolerance: by how much the number may differ, as a fraction of ``count``; less than one entry always may.
        sum_over_ranks: turns numbers of this rank into sums over all ranks.

    Example:
        >>> threshold_near([torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.1])], count=2)
        3.0
    """

    def count_above(threshold: float) -> float:
        [above] = sum_over_ranks([float(sum(int(torch.count_nonzero(m > threshold)) for m in M))])
        return above

    low, high = -1.0, 1.0
    at_low, at_high = count_above(low), count_above(high)
    for _ in range(_MOST_EXPANSIONS):
        if at_low >= count >= at_high:
            break
        low, high = 4 * low, 4 * high
        at_low, at_high = count_above(low), count_above(high)
    else:
        return 0.0  # so many entries are not finite that there is no such threshold
    for _ in range(_MOST_BISECTIONS):
        middle = (low + high) / 2
        above = count_above(middle)
        if abs(above - count) <= tolerance * count:
            return middle
        if above > count:
            low, at_low = middle, above
        else:
            high, at_high = middle, above
    return low if abs(at_low - count) < abs(count - at_high) else high


def lift_largest(m: Tensor, count: int) -> None:
    """Raise the ``count`` largest entries of a tensor just above 0, in place, unless they are above 0 already.

    NaN becomes -inf.

    Example:
        >>> m = torch.tensor([-3.0, -1.0, -2.0])
        >>> lift_largest(m, 1)
        >>> (m > 0).tolist()
        [False, True, False]
    """
    flat = _replace_nan_(m).flatten()
    best = flat.topk(count).indices
    flat[best] = flat[best].clamp_min(_BARELY_KEPT)
    if flat.data_ptr() != m.data_ptr():  # a view has changed m already, and may have other strides: no copy onto itself
        m.copy_(flat.view_as(m))


def largest_count(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in [low, high] that fits, by bisection; ``low`` if none above it does.

    Args:
        fits: True up to some number and False from there on.
        low: returned without being tried.
        high: the largest number to try.

    Example:
        >>> largest_count(lambda n: n * n <= 50, 1, 100)
        7
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _replace_nan_(m: Tensor) -> Tensor:
    return m.nan_to_num_(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _largest_number(holds: Callable[[float], bool], *, double: bool) -> float:
    """Return the largest number of single or double precision for which a condition holds; it fails for larger ones."""
    real, whole, bits = ("<d", "<q", 63) if double else ("<f", "<i", 31)

    def place(x: float) -> int:
        """Return a number's place in the order of all numbers: its bits as an integer, inverted if it is negative."""
        i: int = struct.unpack(whole, struct.pack(real, x))[0]
        return i if i >= 0 else i ^ (2**bits - 1)

    def number(i: int) -> float:
        return float(struct.unpack(real, struct.pack(whole, i if i >= 0 else i ^ (2**bits - 1)))[0])

    low, high = place(-math.inf), place(math.inf) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(number(middle)) else (low, middle)
    return number(low)
