"""``AutoPruneCallback``: the hooks that prune a model while Lightning trains it. Wiring, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autoprune.errors import check_range
from lightning_autoprune.method.estimators import Estimator
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.settings import Cost, Granularity, Settings
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.model.prunable_layers import prunable_weights
from lightning_autoprune.reporting.layer_table import LayerSummary
from lightning_autoprune.training.held_out.sources import HeldOutSource, make_source
from lightning_autoprune.training.lightning_internals import has_stepped
from lightning_autoprune.training.model_analysis import check_example
from lightning_autoprune.training.pruning_run import PruningRun
from lightning_autoprune.training.trainer_checks import check_sharding, check_shards, check_trainer, trained_weights

__all__ = ["AutoPruneCallback"]


class AutoPruneCallback(Callback):
    """Prunes the model while it trains: add it to the ``Trainer`` and set nothing, or one target.

    The run has three phases. First the model trains dense. Then auxiliary parameters M decide by their sign which
    weights are kept; they are trained on held-out data to lower the loss, under a pressure that prunes, and a pruned
    weight keeps its value and can come back. Last, the masks are frozen and the weights that are left train on all
    the data. At any moment, and in every checkpoint, pruned weights are true zeros in plain parameters. (Averages that
    other callbacks put in their place have the zeros once the masks are frozen.)

    Args:
        target_sparsity: fraction of all prunable weights to prune, in [0, 1); met exactly when the masks are frozen
            (with neurons, by as few more as their sizes allow). None: the pressure alone decides.
        target_flops: with neurons, the fraction of the model's operations to keep, in (0, 1], in place of
            ``target_sparsity``; met by the model that ``shrink`` gives.
        granularity: ``"weight"``: one m a weight. ``"neuron"``: one m a channel, that is, a neuron or filter; channels
            that must go together share it. The module needs an ``example_input_array``.
        cost: with neurons, what the pressure weighs each by, the ``"parameters"`` or ``"flops"`` that go with it. None:
            that of the target.
        pressure: μ, how strongly M is pushed toward pruning, > 0, in units of the typical gradient of the loss. It
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
        held_out: the data that M is trained on and W is not (``train_gradients`` adds W's own). A fraction in (0, 1):
            that share of the training data, see ``redraw_held_out``. ``"val"``: the validation loaders; masks are then
            fitted on what is reported. ``"train"``: nothing is held out and M follows the gradients of the weight steps
            themselves. A ``DataLoader``: its batches.
        redraw_held_out: whether a fraction is drawn anew from each batch (no data is lost and no more samples pass
            through the network than without pruning), or is one part of the training set for the whole run.
        train_gradients: whether M follows the gradients of the weight steps beside those on held-out data, as one mean
            over the rows of both (over a loader's batches: half and half). None: where a fraction of each batch is held
            out and one optimizer trains all prunable weights. With one tensor more a weight while pruning.
        mask_every_n_steps: an auxiliary step is taken, and the masks updated, every so many training steps, >= 1.
        warmup: fraction of the run that is dense, in [0, 1]; 1 switches pruning off.
        finetune: fraction of the run with frozen masks, in [0, 1); ``warmup + finetune`` must be below 1.
        include: layer-name patterns (``fnmatch``) to prune. None: all linear, convolution, recurrent and attention
            layers; embeddings only where a pattern matches them.
        exclude: layer-name patterns to leave dense.
        layer_floor: share of its weights that each layer keeps whatever happens, in [0, 1); at least one weight.
        loss_fn: takes the module and a held-out batch and returns the loss. None: ``training_step`` is called, in a
            shield that leaves the run untouched. Needed for manual optimization.
        log_every_n_steps: interval of the logs in training steps, >= 1. None: the Trainer's.
        figures_every_n_epochs: when loggers get figures beside the curves, as
            :func:`~lightning_autoprune.training.loggers.figures.log_figures` says: 0, when fitting ends; n, also
            at the end of each n epochs. None: never.
        log_artifact: whether a ``WandbLogger`` gets the best pruned checkpoint when fitting ends, as an artifact of
            type ``model`` with the alias ``pruned``; sparsity, operations and the monitored metric are its metadata.
        seed: decides which rows are held out, and the random numbers of the held-out pass.
        enabled: whether to do anything at all; False gives the same training as no callback, bit for bit.

    Raises:
        AutoPruneError: for a setting out of its range; when fitting starts, for a model, optimizer, loader or
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
        self._source: HeldOutSource = make_source(held_out, redraw_held_out, seed)
        self.train_gradients = train_gradients
        self._loaded: Mapping[str, Any] | None = None
        self._run: PruningRun | None = None
        self._last: PruningRun | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1); 0 before fitting."""
        return self._run.pruner.sparsity if self._run else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are pruned, in [0, 1), by layer name; empty before fitting."""
        return self._run.pruner.layer_sparsity() if self._run else {}

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """By layer name, and ``"all"``, the pairs (step, sparsity) of the run so far; for the plots."""
        return self._run.report.history.curves if self._run else {}

    def layers(self) -> list[LayerSummary]:
        """A row for each layer: shape, weights, those kept, operations, how many came back; empty before fitting."""
        return self._run.layers() if self._run else []

    # Start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what can't work, before any data is loaded."""
        if stage != "fit" or not self.enabled:
            return
        self._loaded, self._last, self._run = None, self._run or self._last, None
        check_trainer(trainer, AutoPruneCallback, self._source.has_batches, self.loss_fn is not None)
        check_sharding(trainer, self.settings.granularity == "neuron", self.log_artifact)
        self._source.steps_done = self._steps_done
        self._source.setup(trainer)

    def _steps_done(self) -> int:
        if self._loaded is not None:
            return int(self._loaded["pruner"]["step"])
        return run.pruner.step if (run := self._active) else 0

    @property
    def _active(self) -> PruningRun | None:
        """The run, while training is under way."""
        return self._run if self._run and self._run.active else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers and checks the optimizers."""
        if not self.enabled:
            return
        weights, _ = self._trained_weights(trainer, pl_module)
        check_example(pl_module, self.settings.granularity)
        known = [*weights, *(self._loaded["left_dense"] if self._loaded else [])]
        dense = [name for name in self._candidates(pl_module) if name not in known]
        if dense:
            rank_zero_warn(
                "Layers that are not trained (frozen, or in no optimizer) stay dense until they are:"
                f" {', '.join(dense)}."
            )

    def _trained_weights(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[dict[str, nn.Parameter], list[Optimizer]]:
        weights = prunable_weights(pl_module, self.include, self.exclude)
        if self._loaded:  # layers that were thawed may be frozen again for now
            pruned, dense = self._loaded["layers"], self._loaded["left_dense"]
            chosen = {*pruned, *weights}.difference(dense)
            found = self._candidates(pl_module)  # which a change of the code may have put in another order
            weights = {name: found[name] for name in [*pruned, *found] if name in chosen and name in found}
        check_shards(trainer, weights)
        needed = None
        if not self._source.has_batches:
            needed = 'held_out="train"'
        elif self.train_gradients:
            needed = "train_gradients=True"
        return trained_weights(trainer, weights, needed)

    def _candidates(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        return prunable_weights(pl_module, self.include, self.exclude, trained_only=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the phases, goes on from a checkpoint if there is one, and hooks into the optimizers."""
        if not self.enabled:
            return
        self._run = None
        self._source.start(trainer, lambda: self._run.upcoming(trainer) if self._run else None)
        weights, optimizers = self._trained_weights(trainer, pl_module)
        run = PruningRun(
            trainer,
            pl_module,
            weights,
            optimizers,
            self.settings,
            self._source,
            self.train_gradients,
            self.loss_fn,
            self.seed,
        )
        if self._loaded is not None:
            run.load_state_dict(self._loaded)
        self._run, self._loaded = run, None
        run.start(trainer)

    # Each step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes what the last epoch's hooks logged; prunes layers too that have been thawed at the start of this."""
        if not (run := self._active):
            return
        if batch_idx == 0:
            run.report.measure(trainer, run.pruner, late=True)
            run.take_in(trainer, self._candidates(pl_module))
        if is_overridden("on_train_batch_end", pl_module):  # which may have written to pruned weights
            run.pruner.after_weight_step()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Masks the gradients before they are clipped; M may need them as they were."""
        if run := self._active:
            run.before_weight_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps M on a held-out batch, updates the masks, moves on to the next phase, and reports."""
        if (run := self._active) and has_stepped(trainer):
            run.end_step(trainer, lambda step: self._log_is_due(trainer, step))

    def _log_is_due(self, trainer: Trainer, step: int) -> bool:
        if self.log_every_n_steps is None:
            return trainer._logger_connector.should_update_logs
        return step % self.log_every_n_steps == 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates, and saves after it, what is pruned, whatever the module's own hooks wrote after the last step."""
        if run := self._active:
            run.pruner.after_weight_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the metric that is followed beside the sparsity."""
        if (run := self._active) and not trainer.sanity_checking:
            run.report.measure(trainer, run.pruner)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the metric too, and logs figures at the interval asked for; those of the end come when fitting ends."""
        if not (run := self._active):
            return
        run.report.measure(trainer, run.pruner)
        run.pruner.after_weight_step()
        every = self.figures_every_n_epochs
        if not run.over and every and (trainer.current_epoch + 1) % every == 0:
            run.log_figures(trainer)

    # The end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so where training ended before pruning did, and lets go of the run."""
        if run := self._active:
            run.report.measure(trainer, run.pruner, late=True)
            if not run.pruner.frozen:
                rank_zero_warn(
                    f"Training ended after {run.pruner.step} of {run.pruner.phases.total} steps, before the masks were"
                    f" frozen: sparsity is {run.pruner.sparsity:.2%}. Resume to go on."
                )
        self._release(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs figures, and the pruned checkpoint if asked for; the checkpoint callbacks have written theirs by now."""
        if self._run is not None:
            self._run.end()
            if self.figures_every_n_epochs is not None:
                self._run.log_figures(trainer, ended=True)
            if self.log_artifact:
                self._run.log_artifact(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the run; what has been pruned stays pruned."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the run, if that has not happened yet."""
        if stage == "fit":
            self._release(trainer)
            if not self._run and self._last and self._last.module is pl_module:  # there was no step left to train
                self._run = self._last
            self._last = None

    def _release(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.release()
        self._source.stop(trainer)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights, the optimizer and the loops; plain types and tensors."""
        if not self.enabled:
            return {}
        if self._loaded is not None:  # restored, and training has not started
            return dict(self._loaded)
        return self._run.state_dict() if self._run else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until training starts, or goes back to it where training is under way."""
        if not self.enabled:
            return
        if state_dict and (run := self._active):  # a learning-rate finder in the middle of a fit does so
            run.go_back(state_dict)
            return
        self._loaded = state_dict or None
        auxiliary = state_dict["pruner"]["auxiliary"] if state_dict else None
        if auxiliary and auxiliary["frozen"]:
            self._source.on_masks_final()  # before the training loader is made
