"""How to prune: every setting of the method once, with its type, default, allowed values and help. Torch only.

``AutoPruneCallback`` takes the same settings and a few more (``training.callback_settings``); a test checks that its
signature and its docstring agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from lightning_autoprune.errors import AutoPruneError, check_choice, check_range
from lightning_autoprune.method.dense_phase import LATE
from lightning_autoprune.method.estimators import Estimator, EstimatorName, check_estimator
from lightning_autoprune.method.granularity import GRANULARITIES, GranularityName
from lightning_autoprune.method.initialization import INITIAL_M, InitialM
from lightning_autoprune.method.registry import describe, plain_value
from lightning_autoprune.method.schedule import Schedule, ScheduleName, check_schedule
from lightning_autoprune.method.update_rules import UpdateRule, UpdateRuleName, check_rule

__all__ = ["Cost", "Settings", "check_setting", "in_range", "setting"]

Cost = Literal["parameters", "flops"]

Check = Callable[[str, Any], None]
"""Takes the name and the value of a setting; raises unless the value is allowed."""


def in_range(
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    whole: bool = False,
    hint: str = "",
) -> Check:
    """Return a check that a setting is a number between two ends; see ``errors.check_range``."""

    def check(name: str, value: Any) -> None:
        check_range(name, value, low, high, low_open=low_open, high_open=high_open, whole=whole, hint=hint)

    return check


def setting(default: Any, help: str, check: Check = lambda name, value: None) -> Any:  # noqa: A002
    """Return a dataclass field for a setting. None is allowed where it is the default.

    Args:
        default: the value if the user gives none.
        help: the setting's text in the callback's docstring.
        check: raises for a value that is not allowed.
    """
    return field(default=default, metadata={"help": " ".join(help.split()), "check": check})


@dataclass(frozen=True)
class Settings:
    """How to prune: the arguments of :class:`~lightning_autoprune.AutoPruneCallback` of the same names.

    Raises:
        AutoPruneError: for a value that is not allowed; says what is.

    Example:
        >>> Settings(target_sparsity=0.9).target_density
        0.09999999999999998
    """

    target_sparsity: float | None = setting(
        None,
        """fraction of all prunable weights to prune, in [0, 1). It is met exactly when the masks become final (with
        neurons, as closely from above as their sizes allow). None: the pressure alone decides.""",
        in_range(0, 1, high_open=True, hint="It is the fraction of weights to prune."),
    )
    target_flops: float | None = setting(
        None,
        """with neurons, the fraction of the model's operations to keep, in (0, 1], in place of ``target_sparsity``. It
        is met by the model that ``shrink`` returns.""",
        in_range(0, 1, low_open=True, hint="It is the fraction of the dense model's operations to keep."),
    )
    granularity: GranularityName = setting(
        "weight",
        """``"weight"``: one m per weight. ``"neuron"``: one m per channel, that is, per neuron or filter; channels that
        must be removed together share one. Neurons need the module's ``example_input_array``.""",
        lambda name, value: check_choice(name, value, GRANULARITIES),
    )
    cost: Cost | None = setting(
        None,
        """with neurons, what the pressure weighs each neuron by: the ``"parameters"`` or the ``"flops"`` that it costs.
        None: what the target counts.""",
        lambda name, value: check_choice(name, value, get_args(Cost)),
    )
    pressure: float = setting(
        0.05,
        """μ, how strongly M is pushed toward pruning, > 0, in units of the typical gradient of the loss. Without a
        target it is constant; with one it is where the controller starts.""",
        in_range(0, low_open=True),
    )
    schedule: ScheduleName | Schedule = setting(
        "polynomial",
        """the path of the density to the target. ``"polynomial"``: a power of the time left that depends on the target;
        ``"cubic"``, ``"linear"``: a fixed power; or a function of progress in [0, 1], first density and target density
        that returns a density in (0, 1]. Without a target it has no effect.""",
    )  # checked together with the target
    auxiliary_lr: float = setting(
        30.0,
        """η, > 0: how far all auxiliary steps of the run together move an m whose gradient is steady and of typical
        size. Each step takes an equal share. With single weights and the rule ``"adaptive"``, a run of K auxiliary
        steps moves it (K / 1500)^1.5 times as far, at most 10 times: see ``AdaptiveRule.reach``.""",
        in_range(0, low_open=True),
    )
    pull: float = setting(
        0.0,
        """strength of an L1 penalty on W until the masks are final, >= 0; 0: none. With BatchNorm, 0.004 is a good
        value. Only layers whose scale the loss does not depend on have it, which their first 20 steps show.
        λ · sgn(w) is added to their gradients, where λ is ``pull`` / target density · root mean square of all
        gradients; M follows the gradients without it. For ``target_sparsity`` with single weights.""",
        in_range(0),
    )
    estimator: EstimatorName | Estimator = setting(
        "linear",
        """straight-through estimator h'(m), which stands in for the mask's derivative: ``"linear"``,
        ``"hard_sigmoid"``, ``"leaky_relu"``, ``"softplus"``, or a function of M.""",
        lambda name, value: check_estimator(value),
    )
    leaky_slope: float = setting(
        0.1, """slope of the estimator ``"leaky_relu"`` at m <= 0, in [0, 1].""", in_range(0, 1)
    )
    update_rule: UpdateRuleName | UpdateRule = setting(
        "adaptive",
        """``"adaptive"`` (dL/dT · w and μ, divided by each weight's running root mean square of their sum),
        ``"autoprune"`` (the paper's, dL/dT · sgn(w)), ``"vanilla"`` (dL/dT · w, the plain chain rule), or an instance
        of an ``UpdateRule``.""",
        lambda name, value: check_rule(value),
    )
    initial_m: InitialM = setting(
        "fisher",
        """``"fisher"``: M starts at ``initial_scale`` · S / root mean square of S over all layers. S is abs(w) · ⁴√F;
        F is the mean square of the weight's gradient in the last 100 dense steps (1 without dense steps).
        ``"magnitude"``: at ``initial_scale`` · abs(w) / std(w) of its layer; ``"constant"``: at ``initial_scale``.
        Neurons start by magnitude under ``"fisher"``.""",
        lambda name, value: check_choice(name, value, INITIAL_M),
    )
    initial_scale: float = setting(0.1, "size of the initial M, > 0.", in_range(0, low_open=True))
    mask_every_n_steps: int = setting(
        1,
        """interval of the auxiliary steps in training steps, >= 1. Each is followed by an update of the masks.""",
        in_range(1, whole=True),
    )
    warmup: float | None = setting(
        None,
        """fraction of the run that is dense, in [0, 1]; 1 switches pruning off. None: 0.1 for a network that is trained
        already, which the training loss shows: by then it is at least 0.8 times its first value. Otherwise 0.25.""",
        in_range(0, 1),
    )
    finetune: float = setting(
        0.35,
        """fraction of the run with final masks, in [0, 1); ``warmup + finetune`` must be below 1.""",
        in_range(0, 1, high_open=True),
    )
    layer_floor: float = setting(
        0.001,
        """fraction of its weights (or neurons) that each layer always keeps, in [0, 1); at least one.""",
        in_range(0, 1, high_open=True),
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None or entry.default is not None:
                entry.metadata["check"](entry.name, value)
            object.__setattr__(self, entry.name, plain_value(value))
        self._check_targets()
        check_schedule(self.schedule, 0.1 if self.target_density is None else self.target_density)
        warmup = LATE if self.warmup is None else self.warmup
        if warmup < 1 <= warmup + self.finetune:
            raise AutoPruneError(
                f"`warmup` {warmup:g} and `finetune` {self.finetune:g} leave no time to prune: together they must"
                " be below 1. To switch pruning off, use `enabled=False`."
            )

    def _check_targets(self) -> None:
        if self.target_flops is not None and self.target_sparsity is not None:
            raise AutoPruneError("`target_flops` and `target_sparsity` are both given: only one target can be met.")
        for name, value in (("target_flops", self.target_flops), ("cost", self.cost)):
            if value is not None and not GRANULARITIES[self.granularity].prunes_channels:
                raise AutoPruneError(
                    f'`{name}` is {value!r}, and `granularity="{self.granularity}"` makes no layer smaller: use'
                    ' `granularity="neuron"`.'
                )
        if self.target_flops is not None and self.cost == "parameters":
            raise AutoPruneError('`target_flops` is given, so `cost` must be "flops" or None.')
        if self.pull and (self.target_sparsity is None or not GRANULARITIES[self.granularity].prunes_single_weights):
            raise AutoPruneError(
                f"`pull` is {self.pull:g}, and it needs a `target_sparsity` and single weights: give both"
                ' (`granularity="weight"`), or leave `pull` out.'
            )

    @property
    def counts_flops(self) -> bool:
        """True if the cost of a neuron is counted in operations."""
        return self.cost == "flops" or self.target_flops is not None

    @property
    def target_density(self) -> float | None:
        """Fraction of the weights, or of the operations, to keep; None without a target."""
        return self.target_flops if self.target_sparsity is None else 1 - self.target_sparsity

    def described(self) -> dict[str, Any]:
        """Return the settings of the method by name, as plain data."""
        return {entry.name: describe(getattr(self, entry.name)) for entry in fields(Settings)}


def check_setting(name: str, value: Any) -> None:
    """Raise unless a value is allowed for the setting of the given name, whatever the other settings are.

    Raises:
        AutoPruneError: naming the setting, the value and what is allowed.
    """
    _CHECKS[name](name, value)


_CHECKS: dict[str, Check] = {entry.name: entry.metadata["check"] for entry in fields(Settings)}
