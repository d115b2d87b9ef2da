"""Layers that are unfrozen during a run, as finetuning callbacks do: they are pruned from then on where they can be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.shared_memory import shares_entries
from lightning_autoprune.training.lightning_internals import optimizer_by_parameter
from lightning_autoprune.training.lightning_package import Trainer
from lightning_autoprune.training.metrics import MetricsReporter
from lightning_autoprune.training.optimizer_hooks import OptimizerHooks
from lightning_autoprune.training.strategies import support_for
from lightning_autoprune.training.trainer_checks import check_optimizers

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
            if any(shares_entries(weight, other) for other in self._pruner.weights.values()):
                continue  # memory that is pruned already, under another name
            try:
                self._check(name, weight, owners[id(weight)])
                weights = {**self._pruner.weights, name: weight}
                order = {n: i for i, n in enumerate(candidates)}
                weights = dict(sorted(weights.items(), key=lambda item: order.get(item[0], -1)))
                self._pruner.extend(weights)
                self._report.extend(weights)
                self._hooks.follow(weights.values(), owners)
            except AutoPruneError as error:
                rank_zero_warn(f"Layer {name!r}, which has been unfrozen, stays dense. {error}")
                self.left_dense.append(name)

    def end_dense_phase(self, unused: Sequence[str]) -> None:
        """Leave layers dense that no loss has depended on, and warn if nothing is left to prune.

        They would take up a part of the target: the pressure alone acts on them, and prunes nearly all their weights.

        Args:
            unused: their names.
        """
        if unused and self._can_leave_dense(unused):
            self._pruner.leave_dense(unused)
            self._report.extend(self._pruner.weights)
            self.left_dense += unused
            rank_zero_warn(
                f"No loss so far depends on {quote_names(unused)}, so they stay dense and do not count toward the"
                " target. To avoid this warning, `exclude` them."
            )
        elif unused:
            rank_zero_warn(
                f"No loss so far depends on {quote_names(unused)}, so the pressure prunes nearly all of their weights"
                " and few others: `exclude` layers that the loss does not train, such as an average of the weights."
            )
        if not self._pruner.weights:
            phases = self._pruner.phases
            rank_zero_warn(
                "The dense phase is over, and no optimizer trains a prunable weight yet. Layers that are unfrozen in"
                f" the next {phases.end - phases.start} steps are still pruned."
            )

    def _can_leave_dense(self, unused: Sequence[str]) -> bool:
        """Return True if the target can be met by the other layers; False if there are none."""
        return self._pruner.can_extend and self._pruner.can_meet_target(set(self._pruner.weights) - set(unused))

    def _check(self, name: str, weight: nn.Parameter, owner: Optimizer) -> None:
        """Raise if a layer that has been unfrozen can't be pruned."""
        if self._pruner.step >= self._pruner.phases.end:
            raise AutoPruneError("The masks are final.")
        if not self._pruner.can_extend:
            raise AutoPruneError("Neurons are found when fitting starts.")
        if not self._hooks.optimizers:
            check_optimizers([owner])
        elif owner not in self._hooks.optimizers:
            raise AutoPruneError(
                "It has an optimizer of its own, which trained no prunable weight when fitting started."
            )
        support = support_for(self._trainer)
        support.check_unfrozen(self._trainer)
        support.check_weights(self._trainer, {name: weight})
