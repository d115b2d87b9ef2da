r"""The update rules: what drives m, in one auxiliary step m ← m − η · h'(m) · g. Torch only.

================= =================================== =================================================
rule              g                                   source
================= =================================== =================================================
``"vanilla"``     dL/dT · w / s + μ                   the plain chain rule
``"autoprune"``   dL/dT · sgn(w) / s + μ              the paper
``"adaptive"``    g₀ / √v, g₀ = dL/dT · w / s + μ     ours: ``"vanilla"``, each weight by its own scale
================= =================================== =================================================

s is a running root mean square over all weights (see ``pressure``), v one of each weight's own g₀.

The paper asks for three consistencies. Sensitivity: the step must not scale with abs(w). Under ``"vanilla"`` it does;
``"autoprune"`` takes the factor out, and so does the division by √v. Correlation and direction depend on the sign of
the loss's part alone, which is that of dL/d|w| in all three. What ``"adaptive"`` adds is in the pressure: it is
μ / √v, so that it weighs little on a weight that the loss is sensitive to (abs(w) times the root mean square of dL/dT,
the diagonal Fisher information that Optimal Brain Damage prunes by), and most on one that it never notices.

Source: Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, section 3. The division is that of RMSProp (Tieleman and
Hinton, 2012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

__all__ = ["UPDATE_RULES", "RunningSquares", "UpdateRule", "at_least_float32", "sensitivity"]

UpdateRule = Literal["adaptive", "autoprune", "vanilla"]
UPDATE_RULES: tuple[UpdateRule, ...] = get_args(UpdateRule)


def sensitivity(dL_dT: Sequence[Tensor], W: Sequence[Tensor], rule: UpdateRule) -> list[Tensor]:
    """The loss's part of dL/dm, without h'(m): how much the loss wants each weight's magnitude to shrink.

    * ``"autoprune"``: dL/dT · sgn(w) = dL/d|w|. It does not scale with |w| (sensitivity consistency), and m
      moves as |w| wants to move (correlation consistency). A weight of exactly 0 has no direction: 0.
    * ``"vanilla"`` and ``"adaptive"``: dL/dT · w, the plain chain rule.

    Args:
        dL_dT: gradients with respect to the effective weights, pruned entries included.
        W: latent weights, same shapes.
        rule: one of :data:`UPDATE_RULES`.

    Returns:
        One new tensor a weight, in at least float32.

    Example:
        >>> sensitivity([torch.tensor([2.0, 2.0])], [torch.tensor([-0.5, 4.0])], "autoprune")
        [tensor([-2.,  2.])]
        >>> sensitivity([torch.tensor([2.0, 2.0])], [torch.tensor([-0.5, 4.0])], "vanilla")
        [tensor([-1.,  8.])]
    """
    if rule != "autoprune":
        return [at_least_float32(g) * at_least_float32(w) for g, w in zip(dL_dT, W, strict=True)]
    D = torch._foreach_sign(list(W))
    torch._foreach_mul_(D, list(dL_dT))  # exact in any precision
    return [at_least_float32(d) for d in D]


class RunningSquares:
    """Running mean square v of each entry of some tensors, as an exponential average without bias.

    Args:
        like: tensors of the shapes, dtypes and devices.
        decay: weight of the past at each update, in [0, 1).

    Attributes:
        v: the averages so far, biased towards 0.
        updates: number of updates so far, of each tensor.

    Example:
        >>> squares = RunningSquares([torch.zeros(2)])
        >>> G = [torch.tensor([-0.5, 40.0])]
        >>> squares.normalise(G)
        >>> G  # the first is its own root mean square
        [tensor([-1.,  1.])]
    """

    def __init__(self, like: Sequence[Tensor], decay: float = 0.999) -> None:
        self.decay = decay
        self.v = [torch.zeros_like(tensor) for tensor in like]
        self.updates = [0] * len(self.v)

    def normalise(self, G: Sequence[Tensor], which: Sequence[int] | None = None) -> None:
        """Takes one more value of each entry, and divides it by the root mean square so far, in place.

        Args:
            G: the values, in the shapes of the tensors.
            which: numbers of the tensors that they are of. None: all.
        """
        which = range(len(self.v)) if which is None else which
        for i in which:
            self.updates[i] += 1
        v = [self.v[i] for i in which]
        torch._foreach_mul_(v, self.decay)
        torch._foreach_addcmul_(v, list(G), list(G), value=1 - self.decay)
        roots = torch._foreach_div(v, [1 - self.decay ** self.updates[i] for i in which])
        torch._foreach_sqrt_(roots)
        torch._foreach_clamp_min_(roots, 1e-6)  # an entry that never had a gradient stays 0
        torch._foreach_div_(list(G), roots)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"v": [v.clone() for v in self.v], "updates": list(self.updates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it, on tensors of the same shapes."""
        self.updates = list(state["updates"])
        for v, saved in zip(self.v, state["v"], strict=True):
            v.copy_(saved)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself if it is float32 or float64, else a float32 copy."""
    return x if x.dtype == torch.float64 else x.float()
