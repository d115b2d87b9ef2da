r"""The update rules: what drives m, in one auxiliary step m ← m − η · h'(m) · g. Torch only.

================= =================================== =================================================
rule              g                                   source
================= =================================== =================================================
``"vanilla"``     g₀ = dL/dT · w / s + μ              the plain chain rule
``"autoprune"``   g₀ = dL/dT · sgn(w) / s + μ         the paper
``"adaptive"``    g₀ / √v, g₀ = dL/dT · w / s + μ     ours: ``"vanilla"`` divided by a scale per weight
================= =================================== =================================================

s is a running root mean square over all weights (:class:`GradientScale`), and v is the running mean square of each
weight's own g₀.

The paper asks for three kinds of consistency. Sensitivity: the step must not scale with abs(w). Under ``"vanilla"`` it
does; ``"autoprune"`` takes the factor out, and so does the division by √v. Correlation and direction depend only on the
sign of the loss's part, which is the sign of dL/d|w| in all three rules. ``"adaptive"`` also changes the pressure, to
μ / √v. It weighs little on a weight that the loss is sensitive to (abs(w) times the root mean square of dL/dT,
the diagonal Fisher information that Optimal Brain Damage prunes by), and most on a weight that the loss never notices.

To add a rule, write a class here and give it a name in :data:`UPDATE_RULES` and :data:`UpdateRuleName`. Users can pass
an instance of their own class to ``update_rule=``.

Source: Xiao, Wang, Rajasekaran, "AutoPrune", NeurIPS 2019, section 3. The division by √v is that of RMSProp (Tieleman
and Hinton, 2012).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.registry import describe, describe_result, look_up

__all__ = [
    "UPDATE_RULES",
    "AdaptiveRule",
    "AutoPruneRule",
    "GradientScale",
    "SparseGradientRule",
    "UpdateRule",
    "UpdateRuleName",
    "VanillaRule",
    "check_rule",
    "make_rule",
]

UpdateRuleName = Literal["adaptive", "autoprune", "vanilla"]


class UpdateRule(ABC):
    """Base class of the rules that turn gradients into steps of M.

    A subclass gives the loss's part of dL/dm, and may change g₀ and keep running averages. All methods work entry by
    entry: they get flat pieces of M, which may hold several layers. An instance holds settings only. Its running
    averages are tensors of the shape of M, which are passed to :meth:`direction` by name, start at 0, and are saved,
    resumed and sharded together with M.

    Attributes:
        state_names: names of the running averages.
        removes_scale: True if g does not depend on the scale of g₀. Otherwise the sum over the weights of a channel is
            divided by the square root of their number.

    Example:
        >>> import torch
        >>> class Momentum(UpdateRule):
        ...     state_names = ("mean",)
        ...     def sensitivity(self, dL_dT, W):
        ...         return dL_dT * W.sign()
        ...     def direction(self, g0, state, updates, decay):
        ...         return state["mean"].lerp_(g0, 0.1)
        >>> from lightning_autoprune import AuxiliaryParameters
        >>> aux = AuxiliaryParameters({"layer": torch.ones(3)}, update_rule=Momentum())
        >>> aux.step([torch.tensor([1.0, -1.0, 1.0])], lr=0.1, mu=0.5)
        True
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    removes_scale: ClassVar[bool] = False

    @abstractmethod
    def sensitivity(self, dL_dT: Tensor, W: Tensor) -> Tensor:
        """Return the loss's part of dL/dm without h'(m): how much the loss wants each magnitude to shrink.

        Args:
            dL_dT: gradient with respect to the effective weights, pruned entries included; at least float32. It is
                the user's own gradient and must not be changed.
            W: latent weights, of the same shape and dtype.

        Returns:
            A tensor of that shape.
        """

    def direction(self, g0: Tensor, state: Mapping[str, Tensor], updates: int, decay: float) -> Tensor:
        """Return g for g₀ = sensitivity / s + μ; by default g₀ itself.

        Args:
            g0: g₀ of some entries; it may be changed in place.
            state: the running averages of the same entries, by name, to be updated in place.
            updates: number of auxiliary steps so far, this one included.
            decay: weight of the past in the running averages, in [0, 1).
        """
        return g0

    def decay(self, steps: float) -> float:
        """Return the decay of s and of the running averages in a run of ``steps`` auxiliary steps.

        By default they remember a fortieth of the pruning phase, but at least 10 steps and at most 1000. The pressure
        that the path to a target needs rises and falls by powers of ten, and v contains its square: with a memory of
        1000 steps in a run of 1000 steps, M would hardly move after the steepest part of the path, which costs accuracy
        at high targets (docs/settings.md).

        Example:
            >>> AdaptiveRule().decay(4000)
            0.99
        """
        return 1 - 1 / min(max(steps / 40, 10.0), 1000.0)

    def reach(self, steps: float) -> float:
        """Return by how many times ``auxiliary_lr`` a run of ``steps`` auxiliary steps can move an m, above 0.

        By default 1. A rule whose steps have the same size whatever the evidence should return less for short runs:
        the sum of few noisy steps says little about a weight, and must not overrule what M starts with.
        """
        return 1.0


class VanillaRule(UpdateRule):
    """The plain chain rule: g = dL/dT · w / s + μ.

    Example:
        >>> import torch
        >>> VanillaRule().sensitivity(torch.tensor([2.0, 2.0]), torch.tensor([-0.5, 4.0]))
        tensor([-1.,  8.])
    """

    def sensitivity(self, dL_dT: Tensor, W: Tensor) -> Tensor:
        """Return dL/dT · w."""
        return dL_dT * W


class AutoPruneRule(UpdateRule):
    """The paper's rule: g = dL/dT · sgn(w) / s + μ.

    It does not scale with abs(w) (sensitivity consistency), and m moves in the direction in which the loss wants abs(w)
    to move (correlation consistency). A weight of exactly 0 has no direction, so its sensitivity is 0.

    Example:
        >>> import torch
        >>> AutoPruneRule().sensitivity(torch.tensor([2.0, 2.0]), torch.tensor([-0.5, 4.0]))
        tensor([-2.,  2.])
    """

    def sensitivity(self, dL_dT: Tensor, W: Tensor) -> Tensor:
        """Return dL/dT · sgn(w) = dL/d|w|."""
        return dL_dT * W.sign()


class AdaptiveRule(UpdateRule):
    """The default: g = g₀ / √v with g₀ = dL/dT · w / s + μ, and v the running mean square of g₀.

    v is a bias-corrected exponential average. An entry that never had a gradient stays 0.

    Example:
        >>> import torch
        >>> g0, v = torch.tensor([-0.5, 40.0]), torch.zeros(2)
        >>> AdaptiveRule().direction(g0, {"v": v}, updates=1, decay=0.999)  # each is its own root mean square
        tensor([-1.,  1.])
    """

    state_names = ("v",)
    removes_scale = True

    def sensitivity(self, dL_dT: Tensor, W: Tensor) -> Tensor:
        """Return dL/dT · w."""
        return dL_dT * W

    def reach(self, steps: float) -> float:
        """Return (steps / 1500)^1.5, at most 10.

        The division by √v makes each step about ±η, even where the gradient is noise. ``benchmarks/finetuning.py`` has
        runs of 24 to 1100 auxiliary steps, and ``benchmarks/accuracy.py`` runs of up to 7100.

        Example:
            >>> AdaptiveRule().reach(15_000), AdaptiveRule().reach(15)
            (10.0, 0.001)
        """
        return min(float((steps / 1500) ** 1.5), 10.0)

    def direction(self, g0: Tensor, state: Mapping[str, Tensor], updates: int, decay: float) -> Tensor:
        """Return g₀ / √v, in place of g₀."""
        v = state["v"].mul_(decay).addcmul_(g0, g0, value=1 - decay)
        root = (v / (1 - decay**updates)).sqrt_()
        return g0.div_(root.clamp_min_(1e-6))


class SparseGradientRule(UpdateRule):
    """Another rule's sensitivities, but 0 where the gradient is exactly 0, even if the weight there is NaN or infinite.

    Example:
        >>> import torch
        >>> rule = SparseGradientRule(VanillaRule())
        >>> rule.sensitivity(torch.tensor([0.0, 2.0]), torch.tensor([torch.nan, 4.0]))
        tensor([0., 8.])
    """

    def __init__(self, rule: UpdateRule) -> None:
        self._rule = rule
        self.removes_scale = rule.removes_scale  # type: ignore[misc]

    def sensitivity(self, dL_dT: Tensor, W: Tensor) -> Tensor:
        """Return the other rule's result, or 0 without a gradient."""
        return torch.where(dL_dT == 0, 0.0, self._rule.sensitivity(dL_dT, W))


UPDATE_RULES: Mapping[str, type[UpdateRule]] = {
    "adaptive": AdaptiveRule,
    "autoprune": AutoPruneRule,
    "vanilla": VanillaRule,
}


def make_rule(rule: UpdateRuleName | UpdateRule) -> UpdateRule:
    """Return the rule that a name stands for, or the user's own.

    Raises:
        AutoPruneError: for an unknown name, or an object that is not an :class:`UpdateRule`.
    """
    if isinstance(rule, UpdateRule):
        return rule
    return look_up("update_rule", rule, UPDATE_RULES, objects="an instance of an `UpdateRule`")()


def check_rule(rule: UpdateRuleName | UpdateRule) -> None:
    """Raise unless a rule works on a small M.

    Raises:
        AutoPruneError: for an unknown name, or a rule that raises or returns anything but finite numbers in the shape
            of M; names the method.
    """
    made, name = make_rule(rule), describe(rule)
    if not isinstance(made.state_names, tuple) or not all(isinstance(key, str) for key in made.state_names):
        raise AutoPruneError(
            f"`state_names` of the `update_rule` {name} is {made.state_names!r}; it must be a tuple of names."
        )
    W, state = torch.linspace(-1, 1, 6), {key: torch.zeros(6) for key in made.state_names}
    calls: dict[str, Callable[[], Any]] = {
        "sensitivity": lambda: made.sensitivity(torch.linspace(1, 2, 6), W),
        "direction": lambda: made.direction(torch.linspace(1, 2, 6), state, 1, 0.9),
    }
    for method, call in calls.items():
        try:
            result = call()
        except Exception as error:
            raise AutoPruneError(
                f"`{method}` of the `update_rule` {name} failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(result, Tensor) or result.shape != W.shape or not _are_finite_floats(result):
            raise AutoPruneError(
                f"`{method}` of the `update_rule` {name} returned {describe_result(result)} for entries of shape"
                f" {tuple(W.shape)}; it must return finite floats in that shape."
            )
    decay = made.decay(1000)
    if not isinstance(decay, Real) or not 0 <= decay < 1:
        raise AutoPruneError(f"`decay` of the `update_rule` {name} returned {decay!r}; it must be a number in [0, 1).")


def _are_finite_floats(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.isfinite().all())


@dataclass
class GradientScale:
    """Running root mean square s of the sensitivities, a bias-corrected exponential average. Pure Python.

    The loss's part of the auxiliary gradient is divided by s, so that η and μ are plain numbers: multiplying the loss
    by a constant changes neither the masks nor the settings. (The paper does not state how its loss is scaled.)

    Attributes:
        decay: weight of the past at each update, in [0, 1).
        mean_square: the average so far, biased toward 0.
        updates: number of updates so far.

    Example:
        >>> scale = GradientScale(decay=0.9)
        >>> scale.update(4.0)  # the first value is returned unchanged
        2.0
    """

    decay: float = 0.999
    mean_square: float = 0.0
    updates: int = 0

    def update(self, mean_square: float) -> float:
        """Add the mean square of one gradient, and return the root mean square s so far."""
        self.updates += 1
        self.mean_square += (1 - self.decay) * (mean_square - self.mean_square)
        return math.sqrt(self.mean_square / (1 - self.decay**self.updates))
