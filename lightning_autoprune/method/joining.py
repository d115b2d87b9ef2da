"""Let weights that are trained later join those that are pruned already. Torch only.

A layer that joins with a small M, all of it kept, is pruned in a few steps by the pressure that the others need. The
sparsity then overshoots the target, and comes back only when the masks become final. So the new layer starts where the
others are: at the same density, with an M of the same size, which as many steps can change.
"""

from __future__ import annotations

import torch

from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["start_like"]

_BARELY_KEPT = 1e-8

_LARGEST = 1e30  # of what equal weights are scaled to


def start_like(joining: AuxiliaryParameters, present: AuxiliaryParameters) -> None:
    """Move the M of new weights so that their density is that of the present weights, and their M is as large.

    The order of the new m stays. The mean sizes of those that are kept, and of those that are pruned, become equal to
    those of the present weights.

    Args:
        joining: the new weights, with the M that they start with.
        present: those that are pruned already; unchanged.

    Example:
        >>> present = AuxiliaryParameters({"old": torch.ones(4)})
        >>> present.M[0].copy_(torch.tensor([2.0, 4.0, -1.0, -5.0]))
        tensor([ 2.,  4., -1., -5.])
        >>> present.update_masks()
        >>> joining = AuxiliaryParameters({"new": torch.tensor([1.0, 5.0, -3.0, 2.0])})
        >>> start_like(joining, present)
        >>> joining.M[0].round(decimals=3), joining.weights["new"]
        (tensor([-4.,  6.,  0., -2.]), tensor([ 0.,  5., -3.,  0.]))
    """
    before = [M.clone() for M in joining.flat_M]
    joining.meet(present.density)
    kept_values = [x[M > 0] for x, M in zip(before, joining.flat_M, strict=True)]
    threshold = min((float(values.min()) for values in kept_values if values.numel()), default=0.0)
    for M, x in zip(joining.flat_M, before, strict=True):
        M.copy_(torch.where(M > 0, (x - threshold).clamp_min(_BARELY_KEPT), (x - threshold).clamp_max(0)))
    factors = [wanted / max(now, 1e-30) for wanted, now in zip(_mean_sizes(present), _mean_sizes(joining), strict=True)]
    for M in joining.flat_M:
        M.mul_(torch.where(M > 0, factors[0], factors[1])).clamp_(-_LARGEST, _LARGEST)
    joining.update_masks()


def _mean_sizes(aux: AuxiliaryParameters) -> tuple[float, float]:
    """Return the mean of abs(m) over what is kept, and over what is pruned; 0 where there is nothing."""
    sums = [0.0, 0.0, 0.0, 0.0]
    for M in aux.flat_M:
        positive, negative = float(M.clamp_min(0).sum()), -float(M.clamp_max(0).sum())
        count = float(torch.count_nonzero(M > 0))
        sums = [a + b for a, b in zip(sums, [positive, count, negative, M.numel() - count], strict=True)]
    if not aux.granularity.replicated:
        sums = aux.placement.sum(sums)
    return sums[0] / max(sums[1], 1.0), sums[2] / max(sums[3], 1.0)
