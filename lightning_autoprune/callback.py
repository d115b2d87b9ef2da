"""``AutoPruneCallback``: the hooks that prune a model while Lightning trains it. Wiring, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autoprune.auxiliary import InitialM
from lightning_autoprune.averages import prune_again, prune_averages
from lightning_autoprune.compatibility import (
    check_trainer,
    has_stepped,
    steps_done,
    total_steps,
    trained_weights,
    will_step,
)
from lightning_autoprune.errors import AutoPruneError, check_range
from lightning_autoprune.estimators import Estimator
from lightning_autoprune.figures import log_figures
from lightning_autoprune.flops import ModelCost
from lightning_autoprune.gradients import MaskGradients
from lightning_autoprune.layers import being_pruned, prunable_weights
from lightning_autoprune.monitored import best_values
from lightning_autoprune.neurons import Cost
from lightning_autoprune.plan import check_example, plan
from lightning_autoprune.pruner import Granularity, Pruner, Settings
from lightning_autoprune.report import Report
from lightning_autoprune.rules import UpdateRule
from lightning_autoprune.sources import Source, make_source
from lightning_autoprune.summary import LayerSummary, summarise

__all__ = ["AutoPruneCallback"]


class AutoPruneCallback(Callback):
    """Prunes the model while it trains: add it to the ``Trainer`` and set nothing, or one target.

    The run has three phases. First the model trains dense. Then auxiliary parameters M decide by their sign which
    weights are kept; they are trained on held-out data to lower the loss, under a pressure that prunes, and a pruned
    weight keeps its value and can come back. Last, the masks are frozen and the weights that are left train on all
    the data. At any moment, and in every checkpoint, pruned weights are true zeros in plain parameters. (Averages that
    other callbacks put in their place have the zeros once the masks are frozen.)

    Args:
        target_sparsity: fraction of all prunable weights to prune, in [0, 1); met exactly when the masks are frozen.
            None: the pressure alone decides.
        target_flops: with neurons, the fraction of the model's operations to keep, in (0, 1], in place of
            ``target_sparsity``; met by the model that ``shrink`` gives.
        granularity: ``"weight"``: one m a weight. ``"neuron"``: one m a channel, that is, a neuron or filter; channels
            that must go together share it. The module needs an ``example_input_array``.
        cost: with neurons, what the pressure weighs each by, the ``"parameters"`` or ``"flops"`` that go with it. None:
            that of the target.
        pressure: μ, how strongly M is pushed towards pruning, > 0, in units of the typical gradient of the loss. It
            stays as it is without a target; with one it is where a controller starts.
        auxiliary_lr: η, > 0: how far all auxiliary steps of the run together move an m whose gradient is steady and of
            typical size. Each step takes its share, so the setting does not depend on the length of the run.
        estimator: straight-through estimator h'(m) that stands in for the mask's derivative.
        leaky_slope: slope of the estimator ``"leaky_relu"`` at m <= 0, in [0, 1].
        update_rule: ``"adaptive"`` (dL/dT · w and μ, divided by their running root mean square of each weight),
            ``"autoprune"`` (the paper's, dL/dT · sgn(w)) or ``"vanilla"`` (dL/dT · w, the plain chain rule).
        initial_m: ``"magnitude"``: M starts at ``initial_scale`` · abs(w) / std(w) of its layer; ``"constant"``: at
            ``initial_scale``.
        initial_scale: size of the initial M, > 0.
        held_out: the data that M is trained on and W is not. A fraction in (0, 1): that share of the training data,
            see ``redraw_held_out``. ``"val"``: the validation loaders; masks are then fitted on what is reported.
            ``"train"``: nothing is held out and M follows the gradients of the weight steps themselves. A
            ``DataLoader``: its batches.
        redraw_held_out: whether a fraction is drawn anew from each batch (no data is lost and no more samples pass
            through the network than without pruning), or is one part of the training set for the whole run.
        train_gradients: whether M follows the gradients of the weight steps beside those on held-out data, as one mean
            over the rows of both (over a loader's batches: half and half). None: where a fraction of each batch is held
            out and one optimiser trains all prunable weights. With one tensor more a weight while pruning.
        mask_every_n_steps: an auxiliary step is taken, and the masks updated, every so many training steps, >= 1.
        warmup: fraction of the run that is dense, in [0, 1]; 1 switches pruning off.
        finetune: fraction of the run with frozen masks, in [0, 1); ``warmup + finetune`` must be below 1.
        include: layer-name patterns (``fnmatch``) to prune. None: all linear, convolution, recurrent and attention
            layers; embeddings only where a pattern matches them.
        exclude: layer-name patterns to leave dense.
        layer_floor: share of its weights that each layer keeps whatever happens, in [0, 1); at least one weight.
        loss_fn: takes the module and a held-out batch and returns the loss. None: ``training_step`` is called, in a
            shield that leaves the run untouched. Needed for manual optimisation.
        log_every_n_steps: interval of the logs in training steps, >= 1. None: the Trainer's.
        figures_every_n_epochs: when loggers get figures beside the curves (see ``figures``): 0, when fitting ends; n,
            also at the end of each n epochs. None: never.
        log_artifact: whether a ``WandbLogger`` gets the best pruned checkpoint when fitting ends, as an artifact of
            type ``model`` with the alias ``pruned``; sparsity, operations and the monitored metric are its metadata.
        seed: decides which rows are held out.
        enabled: whether to do anything at all; False gives the same training as no callback, bit for bit.

    Raises:
        AutoPruneError: for a setting out of its range; when fitting starts, for a model, optimiser, loader or
            checkpoint that the settings can't work with. The message says what to change.

    Source:
        Xiao, Wang, Rajasekaran, "AutoPrune: Automatic Network Pruning by Regularizing Auxiliary Parameters",
        NeurIPS 2019.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=20, logger=False, callbacks=[AutoPruneCallback(target_sparsity=0.95)])

    With LightningCLI::

        trainer:
          callbacks:
            - class_path: lightning_autoprune.AutoPruneCallback
              init_args:
                target_sparsity: 0.95
    """

    def __init__(
        self,
        target_sparsity: float | None = None,
        *,
        target_flops: float | None = None,
        granularity: Granularity = "weight",
        cost: Cost | None = None,
        pressure: float = 0.05,
        auxiliary_lr: float = 30.0,
        estimator: Estimator = "linear",
        leaky_slope: float = 0.1,
        update_rule: UpdateRule = "adaptive",
        initial_m: InitialM = "magnitude",
        initial_scale: float = 0.1,
        held_out: float | Literal["val", "train"] | DataLoader = 0.25,  # type: ignore[type-arg]
        redraw_held_out: bool = True,
        train_gradients: bool | None = None,
        mask_every_n_steps: int = 1,
        warmup: float = 0.25,
        finetune: float = 0.35,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        layer_floor: float = 0.001,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        log_every_n_steps: int | None = None,
        figures_every_n_epochs: int | None = 0,
        log_artifact: bool = False,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        self.settings = Settings(
            target_sparsity=target_sparsity,
            target_flops=target_flops,
            granularity=granularity,
            cost=cost,
            pressure=pressure,
            auxiliary_lr=auxiliary_lr,
            estimator=estimator,
            leaky_slope=leaky_slope,
            update_rule=update_rule,
            initial_m=initial_m,
            initial_scale=initial_scale,
            mask_every_n_steps=mask_every_n_steps,
            warmup=warmup,
            finetune=finetune,
            layer_floor=layer_floor,
        )
        if log_every_n_steps is not None:
            check_range("log_every_n_steps", log_every_n_steps, 1, whole=True)
        if figures_every_n_epochs is not None:
            check_range("figures_every_n_epochs", figures_every_n_epochs, 0, whole=True)
        self.include, self.exclude = include, exclude
        self.loss_fn, self.log_every_n_steps, self.seed = loss_fn, log_every_n_steps, seed
        self.figures_every_n_epochs, self.log_artifact = figures_every_n_epochs, log_artifact
        self.enabled = enabled and warmup < 1
        self._source: Source = make_source(held_out, redraw_held_out, seed)
        self.train_gradients = train_gradients
        self._handles: list[Any] = []  # not empty while the hooks are at work
        self._loaded: Mapping[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._pruner: Pruner | None = None
        self._report = Report()
        self._gradients: MaskGradients | None = None
        self._cost: ModelCost | None = None  # of the dense model

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1); 0 before fitting."""
        return self._pruner.sparsity if self._pruner else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are pruned, in [0, 1), by layer name; empty before fitting."""
        return self._pruner.layer_sparsity() if self._pruner else {}

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """By layer name, and ``"all"``, the pairs (step, sparsity) of the run so far; what :mod:`plots` draws."""
        return self._report.history.curves

    def layers(self) -> list[LayerSummary]:
        """A row for each layer: shape, weights, those kept, operations, and how many came back."""
        if self._pruner is None:
            return []
        flops = {name: layer.flops for name, layer in self._cost.layers.items()} if self._cost else None
        revived = dict(zip(self._pruner.weights, self._report.history.revived, strict=True))
        return summarise(self._pruner.weights, flops, revived)

    # Start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what can't work, before any data is loaded."""
        if stage != "fit" or not self.enabled:
            return
        self._loaded = None
        check_trainer(trainer, AutoPruneCallback, self._source.holds_out, self.loss_fn is not None)
        self._source.clock = self._steps_done
        self._source.setup(trainer)

    def _steps_done(self) -> int:
        if self._loaded is not None:
            return int(self._loaded["pruner"]["step"])
        return self._pruner.step if self._pruner and self._handles else 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers and checks the optimisers."""
        if not self.enabled:
            return
        weights, _ = self._trained_weights(trainer, pl_module)
        check_example(pl_module, self.settings.granularity)
        every = prunable_weights(pl_module, self.include, self.exclude, trained_only=False)
        dense = [name for name in every if name not in weights]
        if dense:
            rank_zero_warn(f"Layers that are not trained (frozen, or in no optimiser) stay dense: {', '.join(dense)}.")

    def _trained_weights(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[dict[str, nn.Parameter], list[Optimizer]]:
        weights = prunable_weights(pl_module, self.include, self.exclude)
        needed = None
        if not self._source.holds_out:
            needed = 'held_out="train"'
        elif self.train_gradients:
            needed = "train_gradients=True"
        return trained_weights(trainer, weights, needed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the phases, goes on from a checkpoint if there is one, and hooks into the optimisers."""
        if not self.enabled:
            return
        self._forget()
        self._source.start(trainer, lambda: self._upcoming(trainer))
        weights, optimizers = self._trained_weights(trainer, pl_module)
        weights, neurons, self._cost = plan(pl_module, weights, self.settings)
        if trainer.world_size > 1 and neurons:  # numbered alike on all ranks
            neurons = trainer.strategy.broadcast(neurons).to(pl_module.device)
        self._report = Report(list(weights))
        self._pruner = Pruner(weights, self.settings, total_steps(trainer), steps_done(trainer), neurons)
        self._gradients = MaskGradients(
            self._pruner, self._source, optimizers, self._report, self.train_gradients, self.loss_fn, self.seed
        )
        if self._loaded is not None:
            self._pruner.load_state_dict(self._loaded["pruner"])
            self._report.load_state_dict(self._loaded["report"])
            self._gradients.load_state_dict(self._loaded["gradients"])
            if not self._pruner.frozen:
                self._resume_source(self._loaded)
            self._loaded = None
        self._pruner.start()
        if not self._pruner.frozen:
            being_pruned.update(pl_module.modules())
        else:
            self._source.finetune()
            prune_averages(trainer, self._pruner)
        self._handles = [optimizer.register_step_post_hook(self._after_weight_step) for optimizer in optimizers]

    def _resume_source(self, state: Mapping[str, Any]) -> None:
        if self._source.name != state["source"]:
            raise AutoPruneError(
                f"The checkpoint's run held out {state['source']}; this callback holds out {self._source.name}. Resume"
                " with the same `held_out`, `redraw_held_out` and `seed`, or start from the checkpoint's weights alone."
            )
        self._source.load_state_dict(state["held_out"])

    # Each step

    def _upcoming(self, trainer: Trainer) -> int | None:
        """The number of the training step that the batch being loaded ends, if an auxiliary step follows it."""
        return self._pruner.step if self._pruner and self._pruner.due and will_step(trainer) else None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Masks the gradients before they are clipped; M may need them as they were."""
        if self._handles and self._pruner is not None and self._gradients is not None:
            self._gradients.before_weight_step(trainer, optimizer)
            self._pruner.before_weight_step()

    def _after_weight_step(self, *_: Any) -> None:
        if self._pruner is not None:
            self._pruner.after_weight_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps M on a held-out batch, updates the masks, moves on to the next phase, and reports."""
        if not self._handles or self._pruner is None or self._gradients is None or not has_stepped(trainer):
            return
        self._gradients.after_weight_step(trainer)
        if self._pruner.last:
            self._report.history.look_at(self._pruner.M)
        frozen_now = self._pruner.end_step()
        if frozen_now:
            being_pruned.difference_update(pl_module.modules())
            self._finish_pruning(trainer)
        layers = self._pruner.layer_sparsity()
        flops = self._cost.flops_left(layers) if self._cost else None
        metrics = self._report.publish(trainer, 1 - self._pruner.sparsity, self._pruner.mu, flops)
        if frozen_now or self._log_is_due(trainer):
            self._report.log(trainer, metrics, layers, self._pruner.masks(), remember=frozen_now)

    def _finish_pruning(self, trainer: Trainer) -> None:
        assert self._pruner is not None
        assert self._gradients is not None
        self._source.finetune()
        prune_averages(trainer, self._pruner)
        if self._gradients.last < 0 and self._pruner.phases.end > self._pruner.phases.start:
            rank_zero_warn("No auxiliary step was taken, so the masks follow the weights' magnitude alone: run longer.")

    def _log_is_due(self, trainer: Trainer) -> bool:
        assert self._pruner is not None
        if self.log_every_n_steps is None:
            return trainer._logger_connector.should_update_logs
        return self._pruner.step % self.log_every_n_steps == 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the metric that is followed beside the sparsity."""
        if self._handles and not trainer.sanity_checking:
            self._report.measure(trainer, self.sparsity)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs figures of the run so far, at the interval asked for."""
        every = self.figures_every_n_epochs
        if self._handles and self._pruner is not None and every and (trainer.current_epoch + 1) % every == 0:
            if self._pruner.M:
                self._report.history.look_at(self._pruner.M)
            self._log_figures(trainer)

    def _log_figures(self, trainer: Trainer, best: dict[str, float] | None = None) -> None:
        if trainer.is_global_zero:
            log_figures(trainer, steps_done(trainer), self.layers(), self._report.history, best)

    # The end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where training ended before pruning did, and lets go of the run."""
        if self._handles and self._pruner is not None and not self._pruner.frozen:
            rank_zero_warn(
                f"Training ended after {self._pruner.step} of {self._pruner.phases.total} steps, before the masks were"
                f" frozen: sparsity is {self._pruner.sparsity:.2%}. Resume to go on."
            )
        self._release(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the pruned checkpoint to W&B, if asked for; the checkpoint callbacks have written theirs by now."""
        if self._pruner is not None:
            prune_again(self._pruner)
            if self.figures_every_n_epochs is not None:
                self._log_figures(trainer, best_values(trainer, self._report.history, self.sparsity))
        if self.log_artifact and self._pruner is not None and self._pruner.frozen and trainer.is_global_zero:
            from lightning_autoprune._wandb import log_artifact

            layers = self._pruner.layer_sparsity()
            metadata = {"sparsity": self._pruner.sparsity, "layer_sparsity": layers}
            if self._cost:
                metadata["flops"] = self._cost.flops_left(layers)
            log_artifact(trainer, self._pruner.weights, metadata)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the run; what has been pruned stays pruned."""
        self._release(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the run, if that has not happened yet."""
        if stage == "fit":
            self._release(trainer, pl_module)

    def _release(self, trainer: Trainer, pl_module: LightningModule) -> None:
        being_pruned.difference_update(pl_module.modules())
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._source.stop(trainer)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights, the optimiser and the loops; plain types and tensors."""
        if self._loaded is not None:  # restored, and training has not started
            return dict(self._loaded)
        if self._pruner is None or self._gradients is None:
            return {}
        return {
            "source": self._source.name,
            "gradients": self._gradients.state_dict(),
            "pruner": self._pruner.state_dict(),
            "report": self._report.state_dict(),
            "held_out": self._source.state_dict(),
            "flops": {name: layer.flops for name, layer in self._cost.layers.items()} if self._cost else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until training starts."""
        self._loaded = state_dict or None
        auxiliary = state_dict["pruner"]["auxiliary"] if state_dict else None
        if auxiliary and auxiliary["frozen"]:
            self._source.finetune()  # before the training loader is made
