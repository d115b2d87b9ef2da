r"""The update rules: what drives m, in one auxiliary step m ← m − η · h'(m) · g. Torch only.

================= =================================== =================================================
rule              g                                   source
================= =================================== =================================================
``"vanilla"``     dL/dT · w / s + μ                   the plain chain rule
``"autoprune"``   dL/dT · sgn(w) / s + μ              the paper
``"adaptive"``    g₀ / √v, g₀ = dL/dT · w / s + μ     ours: ``"vanilla"``, each weight by its own scale
================= =================================== =================================================

s is a running root mean square over all weights (see ``pressure``), v the running mean square of each weight's own g₀.

The paper asks for three consistencies. Sensitivity: the step must not scale with abs(w). Under ``"vanilla"`` it does;
``"autoprune"`` takes the factor out, and so does the division by √v. Correlation and direction depend on the sign of
the loss's part alone, which is that of dL/d|w| in all three. What ``"adaptive"`` adds is in the pressure: it is
μ / √v, so that it weighs little on a weight that the loss is sensitive to (abs(w) times the root mean square of dL/dT,
the diagonal Fisher information that Optimal Brain Damage prunes by), and most on one that it never notices.

Source: Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, section 3. The division is that of RMSProp (Tieleman and
Hinton, 2012).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = [
    "UPDATE_RULES",
    "GradientScale",
    "RunningSquares",
    "UpdateRule",
    "at_least_float32",
    "decay_for",
    "sensitivity",
]

UpdateRule = Literal["adaptive", "autoprune", "vanilla"]

UPDATE_RULES: tuple[UpdateRule, ...] = get_args(UpdateRule)


def sensitivity(dL_dT: Tensor, W: Tensor, rule: UpdateRule) -> Tensor:
    """The loss's part of dL/dm, without h'(m): how much the loss wants each weight's magnitude to shrink.

    * ``"autoprune"``: dL/dT · sgn(w) = dL/d|w|. It does not scale with |w| (sensitivity consistency), and m
      moves as |w| wants to move (correlation consistency). A weight of exactly 0 has no direction: 0.
    * ``"vanilla"`` and ``"adaptive"``: dL/dT · w, the plain chain rule.

    Args:
        dL_dT: gradient with respect to effective weights, pruned entries included.
        W: latent weights, of the same shape.
        rule: one of :data:`UPDATE_RULES`.

    Returns:
        A new tensor of that shape, in at least float32.

    Example:
        >>> sensitivity(torch.tensor([2.0, 2.0]), torch.tensor([-0.5, 4.0]), "autoprune")
        tensor([-2.,  2.])
        >>> sensitivity(torch.tensor([2.0, 2.0]), torch.tensor([-0.5, 4.0]), "vanilla")
        tensor([-1.,  8.])
    """
    return at_least_float32(dL_dT) * at_least_float32(W.sign() if rule == "autoprune" else W)


def decay_for(steps: float) -> float:
    """Decay with which s and v remember a fortieth of the pruning phase, though at least 10 steps and at most 1000.

    The pressure that the path to a target needs rises and falls by powers of ten, and v has its square in it: with a
    memory of 1000 steps in a run of as many, M would hardly move after the steepest part of the path, which costs at
    high targets (docs/settings.md).

    Args:
        steps: number of auxiliary steps in the phase.

    Example:
        >>> decay_for(4000)
        0.99
    """
    return 1 - 1 / min(max(steps / 40, 10.0), 1000.0)


class RunningSquares:
    """Running mean square v of each entry of a tensor, as an exponential average without bias.

    Args:
        like: a tensor of the shape, dtype and device.
        decay: weight of the past at each update, in [0, 1).

    Attributes:
        v: the average so far, biased toward 0.
        updates: number of updates so far.

    Example:
        >>> squares = RunningSquares(torch.zeros(2))
        >>> squares.count()
        >>> squares.normalize(torch.tensor([-0.5, 40.0]), squares.v)  # the first is its own root mean square
        tensor([-1.,  1.])
    """

    def __init__(self, like: Tensor, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.v = torch.zeros_like(like)

    def count(self) -> None:
        """Begins an update; :meth:`normalize` takes its values."""
        self.updates += 1

    def normalize(self, G: Tensor, v: Tensor) -> Tensor:
        """Takes one more value of each entry, and divides it by the root mean square so far, in place.

        Args:
            G: the values of a part of the entries.
            v: the same part of the averages.
        """
        v.mul_(self.decay).addcmul_(G, G, value=1 - self.decay)
        root = (v / (1 - self.decay**self.updates)).sqrt_()
        return G.div_(root.clamp_min_(1e-6))  # an entry that never had a gradient stays 0


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself if it is float32 or float64, else a float32 copy."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class GradientScale:
    """Running root mean square s of the sensitivities, as an exponential average without bias.

    Attributes:
        decay: weight of the past at each update, in [0, 1).
        mean_square: the average so far, biased toward 0.
        updates: number of updates so far.

    Example:
        >>> scale = GradientScale(decay=0.9)
        >>> scale.update(4.0)  # the first value is taken as it is
        2.0
    """

    decay: float = 0.999
    mean_square: float = 0.0
    updates: int = 0

    def update(self, mean_square: float) -> float:
        """Takes the mean square of one gradient and returns the root mean square s so far."""
        self.updates += 1
        self.mean_square += (1 - self.decay) * (mean_square - self.mean_square)
        return math.sqrt(self.mean_square / (1 - self.decay**self.updates))
