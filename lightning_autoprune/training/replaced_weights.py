"""Weights that the user's code replaces during a run: the run goes on with the new ones where it can."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.sharding import layout, reshard
from lightning_autoprune.training.lightning_internals import optimizer_by_parameter
from lightning_autoprune.training.lightning_package import LightningModule, Trainer
from lightning_autoprune.training.metrics import MetricsReporter
from lightning_autoprune.training.optimizer_hooks import OptimizerHooks
from lightning_autoprune.training.strategies import support_for

__all__ = ["ReplacedWeights", "find_weights"]


class ReplacedWeights:
    """Follows the weights of a run when their parameters are replaced.

    A layer whose new weight has the shape of the old one keeps its masks, M and all that belongs to them. Any other
    layer is forgotten: it is dense, and not counted in the sparsity.

    Args:
        trainer: the trainer.
        module: the module that it trains.
        pruner: prunes the weights.
        report: gets the names of the layers that are left.
        hooks: those around the optimizers' steps.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        pruner: Pruner,
        report: MetricsReporter,
        hooks: OptimizerHooks,
    ) -> None:
        self._trainer, self._module, self._pruner, self._report = trainer, module, pruner, report
        self._hooks = hooks

    def follow(self, *, ended: bool = False) -> list[str]:
        """Go on with the weights that the module has now, and warn of layers that must be forgotten.

        Args:
            ended: whether training has ended. The module may then be on another device, and nothing starts anew.

        Returns:
            The layers that were forgotten and can't be pruned anew.

        Raises:
            AutoPruneError: if a layer must be forgotten while channels are being pruned, or the target can't be met
                without it.
        """
        pruner = self._pruner
        found, old = find_weights(self._module, pruner.weights), dict(pruner.layouts)
        if all(found.get(name) is weight for name, weight in pruner.weights.items()) and all(
            weight.shape == old[name].shape and (ended or layout(weight) == old[name]) for name, weight in found.items()
        ):
            return []
        lost = {name: problem for name in pruner.weights if (problem := self._find_problem(name, found.get(name)))}
        reshaped = {name for name, weight in found.items() if weight.shape != old[name].shape}
        may_start_anew = pruner.can_extend and not pruner.masks_final and not ended
        was_dense = pruner.auxiliary is None
        if not ended:
            self._hooks.follow(found.values(), optimizer_by_parameter(self._trainer))
        new = {name: weight for name, weight in found.items() if name not in lost and name not in reshaped}
        pruner.replace(new, ended=ended)
        self._report.forget({*lost, *reshaped})
        for name in sorted(reshaped - lost.keys()):
            here, before = tuple(found[name].shape), tuple(old[name].shape)
            problem = f"has been replaced by one of shape {here}, and the masks have {before}"
            if not may_start_anew:
                lost[name] = problem
            elif not was_dense:  # else nothing of it had been pruned
                rank_zero_warn(
                    f"The weight of layer {name!r} {problem}. It starts dense, and is pruned anew if an optimizer"
                    " trains it."
                )
        for name, problem in lost.items():
            rank_zero_warn(
                f"The weight of layer {name!r} {problem}. It is dense from now on, and not counted in the sparsity."
            )
        return list(lost)

    def _find_problem(self, name: str, weight: nn.Parameter | None) -> str:
        """Return why a layer can't be pruned any more, whatever the shape of its weight now; empty if it can."""
        if weight is None:
            return "is not a parameter of its own any more: it was removed, shares another layer's, or is computed now"
        try:
            support = support_for(self._trainer)
            support.check_weights(self._trainer, {name: weight})
            if weight is not self._pruner.weights[name] and not self._pruner.masks_final:
                support.check_unfrozen(self._trainer)
        except AutoPruneError as error:
            return f"has been replaced. {str(error).rstrip('.')}"
        return ""


def find_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the parameter that each layer's weight is now, by layer name.

    A parameter that is still in the model belongs to its layer, wherever it is now (``torch.compile`` moves modules).
    In place of any other, the one with the layer's name is returned.

    Args:
        model: the model.
        weights: the parameters so far, by layer name.

    Returns:
        The parameters, in the order of ``weights``, without layers that have none of their own any more.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> weights = {"0": model[0].weight, "1": model[1].weight}
        >>> model[0] = nn.Linear(2, 5)
        >>> {name: tuple(weight.shape) for name, weight in find_weights(model, weights).items()}
        {'0': (5, 2), '1': (2, 2)}
    """
    reshard(model)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    attributes: dict[int, set[str]] = {}  # in which each parameter is
    for key, parameter in by_name.items():
        attributes.setdefault(id(parameter), set()).add(key.rpartition(".")[2])
    found: dict[str, nn.Parameter | None] = {}
    for name, weight in weights.items():  # a parametrization moves the parameter to another attribute
        is_there = attributes.get(id(weight), set()) & {"weight", name.rpartition(".")[2]}
        found[name] = cast(nn.Parameter, weight) if is_there else None
    taken = {id(weight) for weight in found.values()}
    for name, present in found.items():
        replacement = by_name.get(f"{name}.weight", by_name.get(name))
        if present is None and _can_be_pruned(replacement) and id(replacement) not in taken:
            found[name] = replacement
            taken.add(id(replacement))
    return {name: weight for name, weight in found.items() if weight is not None}


def _can_be_pruned(parameter: nn.Parameter | None) -> bool:
    """Return whether a parameter may be that of a layer, rather than of a norm that has its name now."""
    if parameter is None or is_lazy(parameter):
        return False
    return parameter.is_floating_point() and parameter.dim() > 1 and parameter.numel() > 0
