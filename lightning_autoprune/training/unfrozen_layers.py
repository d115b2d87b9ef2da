"""Layers that are unfrozen during a run, as finetuning callbacks do: they are pruned from then on where they can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.training.lightning_internals import optimizer_by_parameter
from lightning_autoprune.training.lightning_package import Trainer
from lightning_autoprune.training.metrics import MetricsReporter
from lightning_autoprune.training.optimizer_hooks import OptimizerHooks
from lightning_autoprune.training.strategies import support_for

__all__ = ["UnfrozenLayers"]


class UnfrozenLayers:
    """Takes layers into a run once they are unfrozen.

    Args:
        trainer: the trainer.
        pruner: prunes the layers that are trained so far.
        report: gets the names of the new layers.
        hooks: those around the optimizers' steps.
        without_channels: layers that stay dense because they have no channel to prune.

    Attributes:
        left_dense: layers that were unfrozen and could not be taken in.
    """

    def __init__(
        self,
        trainer: Trainer,
        pruner: Pruner,
        report: MetricsReporter,
        hooks: OptimizerHooks,
        without_channels: Iterable[str],
    ) -> None:
        self._trainer, self._pruner, self._report, self._hooks = trainer, pruner, report, hooks
        self._without_channels = list(without_channels)
        self.left_dense: list[str] = []

    def take_in(self, candidates: Mapping[str, nn.Parameter]) -> None:
        """Prune the layers that have been unfrozen, and warn of those that must stay dense.

        New optimizers that the user has made are followed too.

        Args:
            candidates: all weights of the module that may be pruned, trained or not, by layer name.
        """
        owners = optimizer_by_parameter(self._trainer)
        self._hooks.follow(self._pruner.weights.values(), owners)
        known = {*self._pruner.weights, *self.left_dense, *self._without_channels}
        pruned = {id(weight) for weight in self._pruner.weights.values()}  # maybe by names that they had before
        for name, weight in candidates.items():
            if name in known or id(weight) in pruned or not weight.requires_grad or id(weight) not in owners:
                continue
            try:
                self._check(name, weight, owners[id(weight)])
                weights = {**self._pruner.weights, name: weight}
                order = {n: i for i, n in enumerate(candidates)}
                weights = dict(sorted(weights.items(), key=lambda item: order.get(item[0], -1)))
                self._pruner.extend(weights)
                self._report.extend(weights)
            except AutoPruneError as error:
                rank_zero_warn(f"Layer {name!r}, which has been unfrozen, stays dense. {error}")
                self.left_dense.append(name)

    def _check(self, name: str, weight: nn.Parameter, owner: Optimizer) -> None:
        """Raise if a layer that has been unfrozen can't be pruned."""
        if self._pruner.masks_final:
            raise AutoPruneError("The masks are final.")
        if not self._pruner.can_extend:
            raise AutoPruneError("Neurons are found when fitting starts.")
        if owner not in self._hooks.optimizers:
            raise AutoPruneError(
                "It has an optimizer of its own, which trained no prunable weight when fitting started."
            )
        support = support_for(self._trainer)
        support.check_unfrozen(self._trainer)
        support.check_weights(self._trainer, {name: weight})
