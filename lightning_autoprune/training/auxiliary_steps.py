"""The auxiliary steps of a run: M follows held-out batches, the weight steps, or both as one mean."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.collectives import all_ranks_agree, mean_over_ranks
from lightning_autoprune.tensors.sharding import is_sharded, local_shard
from lightning_autoprune.tensors.write_detector import WriteDetector
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.held_out.held_out_data import HeldOutData
from lightning_autoprune.training.held_out_pass import SINGLE_SAMPLE, HeldOutGradients, held_out_gradients
from lightning_autoprune.training.lightning_internals import grad_scaler, gradient_scale
from lightning_autoprune.training.lightning_package import Trainer, is_oom_error
from lightning_autoprune.training.metrics import MetricsReporter

__all__ = ["AuxiliarySteps"]

_MAX_BAD_LOSSES = 10
_MAX_OVERFLOWS = 50  # in a row, while a gradient scaler looks for a scale


class AuxiliarySteps:
    """Takes the auxiliary steps of a run, one in each training step where one is due.

    If M follows both gradients, the held-out pass and the step of M come before the optimizer's step, when the weights
    are those of the training pass and their ``grad`` is not masked yet. So both gradients are taken at the same W, and
    that of the training pass need not be copied. If M follows the held-out gradients alone, they come after it.

    Args:
        trainer: the trainer, whose module is trained.
        pruner: the pruner whose M is stepped.
        held_out: gives the held-out batches; if it holds none out, M follows the weight steps alone.
        report: gets the held-out losses.
        settings: those of the callback.

    Attributes:
        last: the training step of the last auxiliary step; -1 before the first.
    """

    def __init__(
        self,
        trainer: Trainer,
        pruner: Pruner,
        held_out: HeldOutData,
        report: MetricsReporter,
        settings: CallbackSettings,
    ) -> None:
        self._trainer, self._pruner, self._held_out, self._report = trainer, pruner, held_out, report
        self._settings = settings
        self.last = -1
        self._batch_was_used = False  # the held-out batch of the training step under way, before a weight step
        self._stepped_at, self._stepped = -1, set[int]()  # the optimizers that stepped M in that training step
        self._bad_losses = 0  # in a row
        self._overflows = 0  # in a row
        self._has_warned = False  # of a held-out batch of one sample
        self._is_scaled = False  # whether a gradient scaler lets gradients overflow now and then
        self._passes = 0  # held-out passes in this fit
        self._untrained = WriteDetector([])
        self.watch_untrained()
        self._layers_with_gradient: set[str] = set()  # so far, in the dense phase

    def watch_untrained(self) -> None:
        """Watch the parameters that are not trained now, for the user's own steps may write to them."""
        untrained = [p for p in self._trainer.lightning_module.parameters() if not p.requires_grad]
        self._untrained.watch(untrained, check_values=True)

    # Around the weight step

    def before_weight_step(self, optimizer: Optimizer, stepped: Container[int], trains_weights: bool) -> None:
        """Step M if it follows the gradients of an optimizer's step, before those of pruned weights are masked.

        Args:
            optimizer: the optimizer whose step begins.
            stepped: the ``id`` of each of its parameters.
            trains_weights: whether it trains prunable weights.
        """
        if self._pruner.auxiliary is None:
            weights = self._pruner.weights
            unseen = weights.keys() - self._layers_with_gradient
            self._layers_with_gradient.update(name for name in unseen if weights[name].grad is not None)
        scaler = grad_scaler(self._trainer)
        self._is_scaled = scaler is not None
        if self._pruner.observes:
            self._observe(stepped, gradient_scale(scaler, optimizer))
        if not (self._held_out.follows_training and self._pruner.due and trains_weights):
            return
        weights = self._weights_to_step(optimizer, stepped)
        if not weights:
            return
        gradients = [
            torch.zeros_like(local_shard(w)) if w.grad is None else local_shard(w.grad) for w in weights.values()
        ]
        if (scale := gradient_scale(scaler, optimizer)) != 1:
            gradients = list(torch._foreach_div(gradients, scale))
        if self._held_out.source.has_batches:
            self._batch_was_used = True
            self._step_on_held_out_batch(weights, gradients)
        else:
            self._step(weights, gradients)

    def _observe(self, stepped: Container[int], scale: float) -> None:
        """Pass on gradients of the dense phase, which decide about the M that pruning starts with."""
        weights = self._trained_weights(stepped)
        found = {name: local_shard(weight.grad) for name, weight in weights.items() if weight.grad is not None}
        self._pruner.observe({name: gradient / scale for name, gradient in found.items()} if scale != 1 else found)

    def _weights_to_step(self, optimizer: Optimizer, stepped: Container[int]) -> dict[str, Tensor]:
        """Return the weights that an optimizer trains, at its first step in this training step; else nothing."""
        if self._held_out.source.has_batches:
            return {} if self._batch_was_used else self._trained_weights()
        if self._stepped_at != self._pruner.step:
            self._stepped, self._stepped_at = set(), self._pruner.step
        if id(optimizer) in self._stepped:
            return {}
        self._stepped.add(id(optimizer))
        return self._trained_weights(stepped)

    def after_weight_step(self) -> None:
        """Pass a held-out batch through the network and step M, if a step is due and the batch was not used before."""
        was_used, self._batch_was_used = self._batch_was_used, False
        if was_used or not (self._held_out.source.has_batches and self._pruner.due):
            return
        if weights := self._trained_weights():
            self._step_on_held_out_batch(weights)

    def _step_on_held_out_batch(self, weights: Mapping[str, Tensor], train_gradients: Sequence[Tensor] = ()) -> None:
        """Pass a held-out batch through the network and step M.

        Args:
            weights: the weights that are trained, by layer name.
            train_gradients: those of the weight step, one per weight, if M follows them too. They are not changed.
        """
        with self._naming_errors("loading the held-out batch"):
            batch = self._held_out.source.next_batch(self._trainer)
        if not self._all_ranks_agree(batch is not None):  # a rank that ran a pass alone could wait forever
            if train_gradients:
                self._step(weights, train_gradients)
            return
        result = self._pass_batch(batch, weights)
        if result == SINGLE_SAMPLE:
            self._warn_of_single_sample()
            if train_gradients:
                self._step(weights, train_gradients)
            return
        if isinstance(result, str):
            self._count_bad_loss(f"the held-out loss is {result}")
            return
        loss, gradients = self._average_over_ranks(result)
        self._report.record_held_out_loss(float(loss))
        if train_gradients:
            self._join(gradients, train_gradients)
        self._step(weights, gradients)

    def _pass_batch(self, batch: Any, weights: Mapping[str, Tensor]) -> HeldOutGradients | str:
        """Return the loss of a held-out batch and its gradients, or what is wrong with the loss."""
        self._passes += 1
        check_values = self._passes & (self._passes - 1) == 0  # slow, so only at the 1st, 2nd, 4th, 8th, … pass
        # parameters that the user's own steps write to, such as a teacher's
        written = [p for p in self._untrained.modified(check_values=check_values) if not p.requires_grad]
        with self._naming_errors("the held-out pass"):
            return held_out_gradients(
                self._trainer,
                batch,
                list(weights.values()),
                self._settings.loss_fn,
                self._settings.seed,
                self._pruner.step,
                agree=self._all_ranks_agree,
                factor=self._held_out.source.rank_weight if self._is_sharded else 1.0,
                preserved=written,
                check_values=check_values,
            )

    @contextmanager
    def _naming_errors(self, what: str) -> Iterator[None]:
        """Say of an error in the block that it is not one of the training itself."""
        try:
            yield
        except AutoPruneError:
            raise
        except Exception as error:
            if is_oom_error(error):  # Lightning's tuner waits for this error
                raise
            raise AutoPruneError(
                f"At training step {self._pruner.step}, {what} (`held_out`) raised {type(error).__name__}: {error}. To"
                ' hold nothing out, pass `held_out="train"`.'
            ) from error

    def _average_over_ranks(self, result: HeldOutGradients) -> HeldOutGradients:
        """Return the mean loss and gradients over the ranks, each with the weight of its batch; in place."""
        averaged = self._is_sharded  # by the backward pass
        sent = [result.loss] if averaged else [result.loss, *result.gradients]
        loss, *gradients = mean_over_ranks(sent, self._held_out.source.rank_weight, self._trainer.world_size)
        return HeldOutGradients(loss, result.gradients if averaged else gradients)

    def _join(self, held_out: Sequence[Tensor], train: Sequence[Tensor]) -> None:
        """Turn held-out gradients into the mean over all samples of them and the weight step's, in place."""
        ranks, share = self._trainer.world_size, self._held_out.source.held_out_share
        if ranks > 1:  # the same on all ranks, whatever the sizes of their batches
            device = self._trainer.strategy.root_device
            share = float(mean_over_ranks([torch.tensor(share, device=device)], 1.0, ranks)[0])
        torch._foreach_lerp_(list(held_out), list(train), 1 - share)

    def _step(self, weights: Iterable[str], gradients: Sequence[Tensor]) -> None:
        """Step M on one gradient per weight, given the names of their layers."""
        by_layer = dict(zip(weights, gradients, strict=True))
        self.last = self._pruner.step
        if self._pruner.auxiliary_step([by_layer.get(name) for name in self._pruner.weights]):
            self._bad_losses = self._overflows = 0
        elif self._is_scaled and self._overflows < _MAX_OVERFLOWS:
            self._overflows += 1
        else:
            self._count_bad_loss("the gradient for the auxiliary step is not finite")

    def _count_bad_loss(self, what: str) -> None:
        """Warn of a step that can't be taken; raise if there were too many in a row."""
        self._bad_losses += 1
        text = f"At training step {self._pruner.step} {what}"
        if self._bad_losses >= _MAX_BAD_LOSSES:
            raise AutoPruneError(f"{text}, for the {self._bad_losses}th time in a row: look at the data and the loss.")
        rank_zero_warn(f"{text}: no auxiliary step is taken, and training goes on.")

    def _warn_of_single_sample(self) -> None:
        if not self._has_warned:
            rank_zero_warn(
                f"The held-out batch of training step {self._pruner.step} has a single sample, of which BatchNorm can't"
                " take statistics: such batches are skipped. `drop_last=True` of their loader leaves them out."
            )
        self._has_warned = True

    # What the steps need

    def _trained_weights(self, stepped: Container[int] | None = None) -> dict[str, Tensor]:
        """Return the weights that are trained now, by layer name; others may be frozen for a while.

        Args:
            stepped: the ``id`` of each parameter that a step trains; None: any may be trained.
        """
        trained = {name: weight for name, weight in self._pruner.weights.items() if weight.requires_grad}
        return {name: weight for name, weight in trained.items() if stepped is None or id(weight) in stepped}

    @property
    def _is_sharded(self) -> bool:
        """True if the weights are sharded: all are, or none is."""
        return any(is_sharded(weight) for weight in self._pruner.weights.values())

    def _all_ranks_agree(self, ok: bool) -> bool:
        return all_ranks_agree(ok, self._trainer.world_size, self._trainer.strategy.root_device)

    def unused_layers(self) -> list[str]:
        """Return the layers that are trained now and that no loss has depended on, at the end of the dense phase."""
        return [name for name in self._trained_weights() if name not in self._layers_with_gradient]

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        with_gradient = sorted(self._layers_with_gradient)
        return {"last": self.last, "bad_losses": self._bad_losses, "layers_with_gradient": with_gradient}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.last, self._bad_losses = state["last"], state["bad_losses"]
        self._layers_with_gradient = set(state["layers_with_gradient"])
