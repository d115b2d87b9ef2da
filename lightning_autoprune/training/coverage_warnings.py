"""Warnings, when fitting starts, of what stays dense: layers that are not trained, matrices in no known layer."""

from __future__ import annotations

from collections.abc import Collection

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_autoprune.model.coverage import IsTrained, find_adapted_layers, find_dense_matrices
from lightning_autoprune.model.prunable_layers import WeightChoice, describe_obstacles
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.lightning_internals import optimizer_by_parameter
from lightning_autoprune.training.lightning_package import LightningModule, Trainer

__all__ = ["warn_of_dense_weights"]

_MOST_NAMES = 10


def warn_of_dense_weights(
    trainer: Trainer,
    module: LightningModule,
    choice: WeightChoice,
    known: Collection[str],
    settings: CallbackSettings,
) -> None:
    """Warn of what stays dense, once for each reason.

    Args:
        trainer: the trainer, with its optimizers.
        module: the module that it trains.
        choice: which weights are pruned once they are trained.
        known: names of layers that are trained, or of which an earlier fit has warned.
        settings: those of the callback.
    """
    owners = optimizer_by_parameter(trainer)

    def is_trained(parameter: nn.Parameter) -> bool:
        return parameter.requires_grad and id(parameter) in owners

    untrained = [name for name in choice.weights if name not in known]
    if untrained:
        rank_zero_warn(
            "Layers that are not trained (frozen, or in no optimizer) stay dense until they are:"
            f" {_shorten(untrained)}."
        )
    if choice.weights and not known:
        rank_zero_warn(
            "No optimizer trains a prunable weight when fitting starts, so pruning waits until layers are unfrozen. If"
            " none will be, check `configure_optimizers`, `include` and `exclude`."
        )
    _warn_of_adapters(module, choice, is_trained)
    _warn_of_other_matrices(choice, is_trained, settings)


def _warn_of_adapters(module: nn.Module, choice: WeightChoice, is_trained: IsTrained) -> None:
    if adapted := find_adapted_layers(module, choice.weights, is_trained):
        rank_zero_warn(
            f"Adapters are trained in place of frozen layers ({_shorten(adapted)}), so only adapters are pruned. A"
            " model into which they are merged is dense: to prune it, train its layers."
        )


def _warn_of_other_matrices(choice: WeightChoice, is_trained: IsTrained, settings: CallbackSettings) -> None:
    """Warn once of matrices in no known layer, and of layers that can't be pruned in place."""
    reasons = f" {describe_obstacles(choice.obstacles)}" if choice.obstacles else ""
    dense = find_dense_matrices(choice, is_trained, settings.exclude)
    if settings.include is None and dense.is_large:
        advice = ""
        if dense.largest:
            names = ", ".join(f"{name!r} ({share:.0%})" for name, share in dense.largest.items())
            advice = f" Of these, {names} can be pruned too: pass `include={dense.patterns}`."
        rank_zero_warn(f"{dense.share:.0%} of the entries of trained matrices stay dense.{advice}{reasons}")
    elif reasons:
        rank_zero_warn(f"Layers that can't be pruned in place stay dense.{reasons}")


def _shorten(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join([*list(names)[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else [])])
