"""Where the gradients come from that M follows: held-out batches, the weight steps, or both as one mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError, listed
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.collectives import all_ranks_agree, mean_over_ranks
from lightning_autoprune.tensors.sharding import is_sharded, local_shard
from lightning_autoprune.tensors.write_detector import WriteDetector
from lightning_autoprune.training.held_out.sources import HeldOutSource
from lightning_autoprune.training.held_out_pass import held_out_gradients
from lightning_autoprune.training.lightning_internals import grad_scaler, scale_left
from lightning_autoprune.training.metrics import MetricsReporter

__all__ = ["AuxiliarySteps"]

_MAX_BAD_LOSSES = 10

_MAX_OVERFLOWS = 50  # that a scaler is given to find a scale


class AuxiliarySteps:
    """Takes the auxiliary steps of a run, one after each weight step where one is due.

    Args:
        module: that is trained.
        pruner: whose M is stepped.
        source: of the held-out batches; if it holds none out, M follows the weight steps alone.
        optimizers: those that train the weights.
        report: gets the held-out losses.
        train_gradients: whether M follows the weight steps too; None: where the source splits each batch and there is
            one optimizer.
        loss_fn: the user's, for held-out batches.
        seed: of the random numbers in the held-out pass.

    Attributes:
        last: the training step of the last auxiliary step; -1 before the first.
    """

    def __init__(
        self,
        module: LightningModule,
        pruner: Pruner,
        source: HeldOutSource,
        optimizers: Sequence[Optimizer],
        report: MetricsReporter,
        train_gradients: bool | None,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None,
        seed: int,
    ) -> None:
        self._pruner, self._source, self._optimizers, self._report = pruner, source, optimizers, report
        self._loss_fn, self._seed = loss_fn, seed
        joined = source.default_train_gradients and len(optimizers) == 1
        self._follows_training = joined if train_gradients is None or not source.has_batches else train_gradients
        self._own: dict[str, Tensor] = {}  # of the weight step under way, by layer
        self._bad_losses = 0
        self._scaled = False  # whether gradients may overflow now and then, which a scaler takes care of
        self._overflows = 0  # in a row
        self.last = -1
        self._untrained = WriteDetector([p for p in module.parameters() if not p.requires_grad], check_values=True)
        self._passes = 0  # of held-out batches, in this fit
        self._without = list(pruner.weights)  # the layers without a gradient so far, in the dense phase

    def before_weight_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Takes the gradients of an optimizer's step, as they are before pruned weights' are masked."""
        if self._pruner.auxiliary is None:
            self._without = [name for name in self._without if self._pruner.weights[name].grad is None]
        scaler = grad_scaler(trainer)
        self._scaled = scaler is not None
        owns = any(optimizer is owner for owner in self._optimizers)
        if self._follows_training and self._pruner.due and owns and self.last < self._pruner.step:
            weights = self._trained()
            gradients = [
                torch.zeros_like(local_shard(w)) if w.grad is None else local_shard(w.grad) for w in weights.values()
            ]
            if scaler and (scale := scale_left(scaler, optimizer)) != 1:
                gradients = list(torch._foreach_div(gradients, scale))
            if self._source.has_batches:
                self._own = {name: gradient.clone() for name, gradient in zip(weights, gradients, strict=True)}
            else:
                self._step(dict(zip(weights, gradients, strict=True)))

    def after_weight_step(self, trainer: Trainer) -> None:
        """Passes a held-out batch, if a step is due, and steps M."""
        if not (self._source.has_batches and self._pruner.due and (weights := self._trained())):
            return
        batch, own, self._own = self._source.next_batch(trainer), self._own, {}
        ranks, device = trainer.world_size, trainer.strategy.root_device

        def agree(good: bool) -> bool:
            return all_ranks_agree(good, ranks, device)

        if not agree(batch is not None):  # what a rank runs alone may wait for the others for ever
            if own:
                self._step(own)
            return
        tensors = list(weights.values())
        sharded = any(is_sharded(weight) for weight in tensors)  # the backward pass takes the mean over the ranks then
        seeds, factor = (self._seed, self._pruner.step), self._source.rank_weight if sharded else 1.0
        self._passes += 1
        thorough = self._passes & (self._passes - 1) == 0  # at the 1st, 2nd, 4th, 8th, …
        # those that the user's own steps write to, such as a teacher's
        kept = [p for p in self._untrained.modified(check_values=thorough) if not p.requires_grad]
        result = held_out_gradients(
            trainer,
            batch,
            tensors,
            self._loss_fn,
            *seeds,
            agree=agree,
            factor=factor,
            kept=kept,
            thorough=thorough,
        )
        if isinstance(result, str):
            self._bad_loss(f"the held-out loss is {result}")
            return
        sent = [result[0]] if sharded else [result[0], *result[1]]
        loss, *gradients = mean_over_ranks(sent, self._source.rank_weight, ranks)
        gradients = gradients or result[1]
        self._report.held_out_loss(float(loss))
        if own.keys() == weights.keys():
            share = self._source.held_out_share
            if ranks > 1:  # the same on all, whatever the sizes of their batches
                share = float(mean_over_ranks([torch.tensor(share, device=device)], 1.0, ranks)[0])
            mean = list(own.values())
            torch._foreach_lerp_(mean, gradients, share)
            gradients = mean
        self._step(dict(zip(weights, gradients, strict=True)))

    def warn_of_unused(self) -> None:
        """Warns, as pruning begins after a dense phase, of layers that the loss does not depend on."""
        if unused := [name for name in self._without if name in self._trained()]:
            rank_zero_warn(
                f"No loss so far depends on {listed(unused)}, so the pressure prunes nearly all of their weights and"
                " little of the others': `exclude` what is not trained by the loss, such as an average of the weights."
            )

    def _trained(self) -> dict[str, Tensor]:
        """The weights that are trained now, by layer name; others may be frozen for a while."""
        return {name: weight for name, weight in self._pruner.weights.items() if weight.requires_grad}

    def _step(self, gradients: Mapping[str, Tensor]) -> None:
        self.last = self._pruner.step
        if self._pruner.auxiliary_step([gradients.get(name) for name in self._pruner.weights]):
            self._bad_losses = self._overflows = 0
        elif self._scaled and self._overflows < _MAX_OVERFLOWS:
            self._overflows += 1
        else:
            self._bad_loss("the gradient for the auxiliary step is not finite")

    def _bad_loss(self, what: str) -> None:
        self._bad_losses += 1
        text = f"At training step {self._pruner.step} {what}"
        if self._bad_losses >= _MAX_BAD_LOSSES:
            raise AutoPruneError(f"{text}, for the {self._bad_losses}th time in a row: look at the data and the loss.")
        rank_zero_warn(f"{text}: no auxiliary step is taken, and training goes on.")

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"last": self.last, "bad_losses": self._bad_losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.last, self._bad_losses = state["last"], state["bad_losses"]
