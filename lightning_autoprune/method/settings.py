"""How to prune: the settings of a run, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning_autoprune.errors import AutoPruneError, check_choice, check_range
from lightning_autoprune.method.estimators import ESTIMATORS, Estimator
from lightning_autoprune.method.initialization import INITIAL_M, InitialM
from lightning_autoprune.method.update_rules import UPDATE_RULES, UpdateRule

__all__ = ["COSTS", "Cost", "Granularity", "Settings"]

Cost = Literal["parameters", "flops"]

COSTS: tuple[Cost, ...] = get_args(Cost)

Granularity = Literal["weight", "neuron"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


@dataclass(frozen=True)
class Settings:
    """How to prune; the arguments of :class:`~lightning_autoprune.AutoPruneCallback` of the same names.

    Raises:
        AutoPruneError: for a value that is not allowed; names it, and what is.
    """

    target_sparsity: float | None = None
    target_flops: float | None = None
    granularity: Granularity = "weight"
    cost: Cost | None = None
    pressure: float = 0.05
    auxiliary_lr: float = 30.0
    estimator: Estimator = "linear"
    leaky_slope: float = 0.1
    update_rule: UpdateRule = "adaptive"
    initial_m: InitialM = "magnitude"
    initial_scale: float = 0.1
    mask_every_n_steps: int = 1
    warmup: float = 0.25
    finetune: float = 0.35
    layer_floor: float = 0.001

    def __post_init__(self) -> None:
        if self.target_sparsity is not None:
            hint = "It is the fraction of weights to prune."
            check_range("target_sparsity", self.target_sparsity, 0, 1, high_open=True, hint=hint)
        check_choice("granularity", self.granularity, GRANULARITIES)
        if self.target_flops is not None:
            hint = "It is the fraction of the dense model's operations to keep."
            check_range("target_flops", self.target_flops, 0, 1, low_open=True, hint=hint)
            if self.target_sparsity is not None:
                raise AutoPruneError("`target_flops` and `target_sparsity` are both given: one target can be met.")
        if self.cost is not None:
            check_choice("cost", self.cost, COSTS)
        for name, value in (("target_flops", self.target_flops), ("cost", self.cost)):
            if value is not None and self.granularity == "weight":
                raise AutoPruneError(
                    f"`{name}` is {value!r}, and single weights are pruned, which makes no layer smaller: use"
                    ' `granularity="neuron"`.'
                )
        if self.target_flops is not None and self.cost == "parameters":
            raise AutoPruneError('`target_flops` is given, so `cost` must be "flops" or None.')
        check_range("pressure", self.pressure, 0, low_open=True)
        check_range("auxiliary_lr", self.auxiliary_lr, 0, low_open=True)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_range("leaky_slope", self.leaky_slope, 0, 1)
        check_choice("update_rule", self.update_rule, UPDATE_RULES)
        check_choice("initial_m", self.initial_m, INITIAL_M)
        check_range("initial_scale", self.initial_scale, 0, low_open=True)
        check_range("mask_every_n_steps", self.mask_every_n_steps, 1, whole=True)
        check_range("warmup", self.warmup, 0, 1)
        check_range("finetune", self.finetune, 0, 1, high_open=True)
        check_range("layer_floor", self.layer_floor, 0, 1, high_open=True)
        if self.warmup < 1 <= self.warmup + self.finetune:
            raise AutoPruneError(
                f"`warmup` {self.warmup:g} and `finetune` {self.finetune:g} leave no time to prune: together they must"
                " be below 1. To switch pruning off, use `enabled=False`."
            )

    @property
    def counts_flops(self) -> bool:
        """Whether what a neuron costs is counted in operations."""
        return self.cost == "flops" or self.target_flops is not None

    @property
    def target_density(self) -> float | None:
        """Fraction of the weights, or of the operations, to keep; None without a target."""
        return self.target_flops if self.target_sparsity is None else 1 - self.target_sparsity
