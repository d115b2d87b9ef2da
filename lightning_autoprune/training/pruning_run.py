"""One fit under the callback: what is pruned, when, by which gradients, and what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.schedule import steps_advised
from lightning_autoprune.model.pruning_mark import mark_as_being_pruned, remove_mark
from lightning_autoprune.reporting.layer_table import LayerSummary, summarize_layers
from lightning_autoprune.tensors.collectives import all_ranks_agree, mean_over_ranks
from lightning_autoprune.tensors.sharding import reshard
from lightning_autoprune.training.auxiliary_steps import AuxiliarySteps
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.followed_metric import best_values
from lightning_autoprune.training.held_out.held_out_data import HeldOutData
from lightning_autoprune.training.lightning_internals import (
    grad_scaler,
    gradient_scale,
    log_is_due,
    steps_done,
    total_steps,
)
from lightning_autoprune.training.lightning_package import LightningModule, Trainer
from lightning_autoprune.training.loggers.figures import log_figures
from lightning_autoprune.training.metrics import MetricsReporter
from lightning_autoprune.training.model_analysis import analyze_model, measure_cost
from lightning_autoprune.training.optimizer_hooks import OptimizerHooks
from lightning_autoprune.training.replaced_weights import ReplacedWeights
from lightning_autoprune.training.unfrozen_layers import UnfrozenLayers
from lightning_autoprune.training.validated_weights import ValidatedWeights
from lightning_autoprune.training.weight_averages import prune_again, prune_averages

__all__ = ["PruningRun"]


class PruningRun:
    """Prunes the module of a trainer from the start of its training to the end.

    Args:
        trainer: the trainer.
        module: the module that it trains.
        weights: those that may be pruned, by layer name.
        optimizers: those that train them.
        settings: those of the callback.
        held_out: gives the held-out data; it has been started.

    Attributes:
        module: the module that is trained.
        pruner: the course of the run.
        report: what is logged.
        auxiliary_steps: takes the auxiliary steps.
        validated_weights: keeps pruned weights zero in validations.

    Raises:
        AutoPruneError: if the length of the run can't be known, the target can't be met, or there are no channels.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        weights: Mapping[str, nn.Parameter],
        optimizers: Sequence[Optimizer],
        settings: CallbackSettings,
        held_out: HeldOutData,
    ) -> None:
        self._trainer, self.module, self._settings, self._held_out = trainer, module, settings, held_out
        self._analysis = analyze_model(module, weights, settings)
        chosen, neurons = self._analysis.weights, self._analysis.neurons
        if trainer.world_size > 1 and neurons:  # all ranks must number the channels alike
            neurons = trainer.strategy.broadcast(neurons).to(module.device)
        self.report = MetricsReporter(list(chosen), log_layers=settings.log_layers)
        self.pruner = Pruner(chosen, settings, total_steps(trainer), steps_done(trainer), neurons)
        self.auxiliary_steps = AuxiliarySteps(trainer, self.pruner, held_out, self.report, settings)
        manual = not module.automatic_optimization
        self._hooks = OptimizerHooks(optimizers, manual, self._prepare_weight_step, self._finish_weight_step)
        without_channels = [name for name in weights if name not in chosen]
        self.validated_weights = ValidatedWeights(trainer, self.pruner)
        self._unfrozen = UnfrozenLayers(trainer, self.pruner, self.report, self._hooks, without_channels)
        self._replaced = ReplacedWeights(trainer, module, self.pruner, self.report, self._hooks)
        self._warned_of_candidates = False

    # Start

    def start(self) -> None:
        """Enter the phase that the run is in, and hook into the optimizers."""
        step, phases = self.pruner.step, self.pruner.phases
        if step > phases.start and self.pruner.auxiliary is None:
            rank_zero_warn(
                f"This fit begins after {step} of {phases.total} steps without a pruning state. Pruning begins after"
                f" {phases.start} steps and ends after {phases.end}, so {max(phases.end - step, 0)} steps are left for"
                " it. For all of them, start a new fit from the weights alone, without `ckpt_path`."
            )
        self._warn_of_short_run()
        self.pruner.start()
        if self.pruner.masks_final:
            self._held_out.source.on_masks_final()
            prune_averages(self._trainer, self.pruner)
        else:
            mark_as_being_pruned(self.module)
        self._held_out.follow(self.pruner, len(self._hooks.optimizers))
        reshard(self.module)  # running the example may have left gathered copies of the old weights
        self._hooks.attach()
        self.validated_weights.remember_places()

    def _warn_of_short_run(self) -> None:
        """Warn at the first step of a run whose target is high for its length."""
        target, total = self._settings.target_sparsity, self.pruner.phases.total
        if target is None or self.pruner.step > 0 or self._settings.granularity != "weight":
            return
        if total < (advised := steps_advised(1 - target)):
            rank_zero_warn(
                f"`target_sparsity` is {target:g}, and the run has {total} steps. Pruning so much so fast costs"
                f" accuracy: {advised} steps or more are advised. Train longer, or ask for less."
            )

    @property
    def is_training(self) -> bool:
        """True while training is under way."""
        return self._hooks.attached

    @property
    def is_over(self) -> bool:
        """True once all steps have been taken."""
        return self.pruner.step >= self.pruner.phases.total

    # Each step

    def follow_weights(self, *, ended: bool = False) -> None:
        """Go on with the parameters that the module has now, where the user's code has replaced some.

        Args:
            ended: whether training has ended.

        Raises:
            AutoPruneError: if the run can't go on with them.
        """
        names = list(self.pruner.weights)
        self._unfrozen.left_dense += self._replaced.follow(ended=ended)
        self.auxiliary_steps.watch_untrained()
        if names != list(self.pruner.weights) and not ended:
            self._analysis.cost = measure_cost(self.module, self.pruner.weights)

    def take_in_unfrozen(self, find_candidates: Callable[[], Mapping[str, nn.Parameter]]) -> None:
        """Also prune layers that have been unfrozen, after following replaced weights.

        Args:
            find_candidates: returns all weights that may be pruned, by layer name.
        """
        self.follow_weights()
        try:
            candidates = find_candidates()
        except AutoPruneError as error:  # the user's code has changed a layer that was all right at the start
            if not self._warned_of_candidates:
                rank_zero_warn(f"Layers that are unfrozen from now on stay dense. {error}")
            self._warned_of_candidates = True
            candidates = {}
        self._unfrozen.take_in(candidates)
        self.pruner.after_weight_step()

    def before_weight_step(self, optimizer: Optimizer) -> None:
        """Step M if it follows these gradients, and mask them before they are clipped."""
        self._hooks.on_before_step(optimizer)

    def _prepare_weight_step(self, optimizer: Optimizer) -> None:
        trains_weights = any(optimizer is followed for followed in self._hooks.optimizers)
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.auxiliary_steps.before_weight_step(optimizer, stepped, trains_weights)
        scaler = grad_scaler(self._trainer) if self._settings.pull else None
        self.pruner.before_weight_step(stepped, gradient_scale(scaler, optimizer))

    def _finish_weight_step(self) -> None:
        self.pruner.after_weight_step()
        self.pruner.before_forward()  # the training step may go on with another pass, and a held-out pass may follow

    def add_loss(self, outputs: Any) -> None:
        """Take in what ``training_step`` returned, as Lightning passes it to hooks, for the loss in it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.pruner.add_loss(loss)

    def _decide_start(self) -> None:
        """Let the training loss, over all ranks, decide whether pruning begins early."""
        losses, source = self.pruner.dense_phase.losses.means(), self._held_out.source
        has_gradients = self._held_out.follows_training or not source.splits_batches  # until batches are split
        ranks, device = self._trainer.world_size, self._trainer.strategy.root_device
        if not all_ranks_agree(losses is not None and has_gradients, ranks, device):
            self.pruner.dense_phase.decide(None)
            return
        assert losses is not None
        first, now = mean_over_ranks([torch.tensor(loss, device=device) for loss in losses], 1.0, ranks)
        self.pruner.dense_phase.decide((float(first), float(now)))

    def end_step(self) -> None:
        """Step M, update the masks, move on to the next phase, and report."""
        self._hooks.end_training_step()
        self.auxiliary_steps.after_weight_step()
        if self.pruner.dense_phase.decides_after(self.pruner.step):
            self._decide_start()
        if self.pruner.auxiliary is None and self.pruner.step + 1 == self.pruner.phases.start:
            self._unfrozen.end_dense_phase(self.auxiliary_steps.unused_layers())
        if self.pruner.enters_phase:
            self.follow_weights()
        became_final = self.pruner.end_step(self.report.history.record_histograms)
        if became_final:
            self._finish_pruning()
        self._report_step(became_final)

    def _report_step(self, became_final: bool) -> None:
        layers = self.pruner.layer_sparsity()
        flops, over = self._analysis.flops_left(layers), self.pruner.masks_final
        metrics = self.report.publish(self._trainer, 1 - self.pruner.sparsity, self.pruner.mu, flops, over=over)
        if became_final or self._log_is_due():
            masks = self.pruner.each_mask() if became_final or not over else ()  # final masks don't change
            self.report.log(self._trainer, metrics, layers, masks, remember=became_final)

    def _log_is_due(self) -> bool:
        every = self._settings.log_every_n_steps
        return log_is_due(self._trainer) if every is None else self.pruner.step % every == 0

    def _finish_pruning(self) -> None:
        remove_mark(self.module)
        self._held_out.source.on_masks_final()
        self.report.history.masks_final_at = steps_done(self._trainer)
        prune_averages(self._trainer, self.pruner)
        if self.auxiliary_steps.last < 0 and self.pruner.phases.end > self.pruner.phases.start:
            rank_zero_warn("No auxiliary step was taken, so the masks follow the weights' magnitude alone: run longer.")

    # What is reported

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings that say how the run is pruned, by name, as plain data."""
        return {**self._settings.hyperparameters(), "held_out": self._held_out.describe()}

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1)."""
        return self.pruner.sparsity

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """The pairs (step, sparsity) so far, by layer name and ``"all"``."""
        return self.report.history.curves

    def layer_sparsity(self) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, by layer name."""
        return self.pruner.layer_sparsity()

    def layers(self) -> list[LayerSummary]:
        """Return a row for each layer."""
        revived = dict(zip(self.pruner.weights, self.report.history.revived, strict=True))
        flops = self._analysis.flops_by_layer()
        return summarize_layers(self.pruner.weights, flops, revived, self.pruner.layer_sparsity())

    def measure(self, *, late: bool = False) -> None:
        """Record the metric that is followed alongside the sparsity, if it has just been measured.

        Args:
            late: whether the hooks of the epoch's end, which may have logged it, are over.
        """
        self.report.measure(self._trainer, self.pruner, late=late)

    def log_figures(self, *, ended: bool = False) -> None:
        """Hand the loggers the figures of the run so far."""
        history = self.report.history
        if self.pruner.M:
            history.record_histograms(self.pruner.M)
        if self._trainer.is_global_zero:
            best = best_values(self._trainer, history) if ended else None
            log_figures(self._trainer, steps_done(self._trainer), self.layers(), history, best)

    def log_artifact(self) -> None:
        """Hand W&B the best checkpoint with final masks."""
        if self.pruner.masks_final:
            from lightning_autoprune.training.loggers.wandb import log_artifact

            layers = self.pruner.layer_sparsity()
            metadata: dict[str, Any] = {"sparsity": self.pruner.sparsity, "layer_sparsity": layers}
            if (flops := self._analysis.flops_left(layers)) is not None:
                metadata["flops"] = flops
            log_artifact(self._trainer, self.pruner, metadata)

    # The end

    def warn_if_unfinished(self) -> None:
        """Warn if training has ended before pruning did."""
        if not self.pruner.weights:
            rank_zero_warn("Nothing was pruned: no optimizer trained a prunable weight before the masks became final.")
        elif not self.pruner.masks_final:
            rank_zero_warn(
                f"Training ended after {self.pruner.step} of {self.pruner.phases.total} steps, before the masks were"
                f" final: sparsity is {self.pruner.sparsity:.2%}. Resume to go on."
            )

    def write_zeros(self) -> None:
        """Zero pruned weights once more, as other callbacks may have overwritten them when fitting ended."""
        prune_again(self.pruner)

    def release(self) -> None:
        """Remove all hooks and marks; pruned weights stay zero."""
        if self.is_training:
            self.pruner.after_backward()  # training may have been interrupted within a step
        remove_mark(self.module)
        self._hooks.remove()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs besides weights, optimizers and loops, as plain types and tensors."""
        return {
            "layers": list(self.pruner.weights),
            "settings": self.pruner.described(),
            "left_dense": list(self._unfrozen.left_dense),
            **self._held_out.state_dict(),
            "gradients": self.auxiliary_steps.state_dict(),
            "pruner": self.pruner.state_dict(),
            "report": self.report.state_dict(),
            "flops": self._analysis.flops_by_layer(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, before :meth:`start`.

        Raises:
            AutoPruneError: if it was made for other layers, shapes or held-out data.
        """
        self._unfrozen.left_dense = list(state["left_dense"])
        self.pruner.load_state_dict(state["pruner"])
        if list(state["layers"]) != list(self.pruner.weights):  # channels are numbered in the order of the layers
            raise AutoPruneError(
                f"The checkpoint's pruning state is for other layers: {quote_names(state['layers'])} there, and"
                f" {quote_names(self.pruner.weights)} here. Build the same model with the same `include` and `exclude`,"
                " or start from its weights alone."
            )
        if self.pruner.auxiliary:
            _warn_of_changed_settings(state["settings"], self.pruner.described(), self.pruner.masks_final)
        self.report.load_state_dict(state["report"])
        self.auxiliary_steps.load_state_dict(state["gradients"])
        if not self.pruner.masks_final:
            self._held_out.load_state_dict(state)

    def go_back(self, state: Mapping[str, Any]) -> None:
        """In the middle of a run, restore what :meth:`state_dict` gave, on weights from the same step.

        Raises:
            AutoPruneError: as :meth:`load_state_dict`; also if the masks are final now and were not then.
        """
        auxiliary = state["pruner"]["auxiliary"]
        if self.pruner.masks_final and not (auxiliary and auxiliary["frozen"]):
            raise AutoPruneError(
                "A checkpoint of an earlier phase can't be restored while the masks are final: stop this fit, and pass"
                " the checkpoint to a new one as `ckpt_path`."
            )
        self.load_state_dict(state)


def _warn_of_changed_settings(saved: Mapping[str, Any], here: Mapping[str, Any], masks_final: bool) -> None:
    """Warn of settings that differ from those of the checkpoint's run.

    Args:
        saved: the settings of the checkpoint's run, and its length as ``steps``.
        here: those of this run.
        masks_final: whether the masks are final; the length of the run does not matter then.
    """
    common = [name for name in here if name in saved]
    changed = [name for name in common if saved[name] != here[name] and not (masks_final and name == "steps")]
    if not changed:
        return
    if masks_final:
        what = "Its masks are final, so they stay: to prune anew, start a new fit from its weights alone."
    else:
        what = "The run goes on with the new ones, as far as they still matter."
    changes = ", ".join(f"{name} {saved[name]} (here {here[name]})" for name in changed)
    rank_zero_warn(f"The checkpoint's run had other settings: {changes}. {what}")
