"""``AutoPruneCallback``: the hooks that prune a model while Lightning trains it. Wiring, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, SupportsIndex

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autoprune.method.estimators import Estimator, EstimatorName
from lightning_autoprune.method.granularity import GranularityName
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.schedule import Schedule, ScheduleName
from lightning_autoprune.method.settings import Cost
from lightning_autoprune.method.update_rules import UpdateRule, UpdateRuleName
from lightning_autoprune.model.prunable_layers import WeightChoice, choose_weights
from lightning_autoprune.reporting.layer_table import LayerSummary
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.coverage_warnings import warn_of_dense_weights
from lightning_autoprune.training.finished_run import FinishedRun
from lightning_autoprune.training.held_out.held_out_data import HeldOutData
from lightning_autoprune.training.lightning_internals import has_stepped, overrides_hook
from lightning_autoprune.training.lightning_package import BaseCallback, LightningModule, Trainer
from lightning_autoprune.training.loggers.hyperparameters import log_settings, stage_settings
from lightning_autoprune.training.mailbox import Mailbox
from lightning_autoprune.training.model_analysis import check_example
from lightning_autoprune.training.pruning_run import PruningRun
from lightning_autoprune.training.strategies import support_for
from lightning_autoprune.training.trainer_checks import (
    check_package,
    check_trainer,
    check_waiting,
    select_trained_weights,
)
from lightning_autoprune.training.weight_averages import without_averages

__all__ = ["AutoPruneCallback"]


class AutoPruneCallback(BaseCallback):
    """Prunes the model while it trains: add it to the ``Trainer`` and set nothing, or one target.

    The run has three phases. First the model trains dense. Then auxiliary parameters M decide by their sign which
    weights are kept. They are trained on held-out data to lower the loss, under a pressure that prunes, and a pruned
    weight keeps its value and can come back. Last, the masks are final, and the kept weights train on all the data.
    Between training steps, and in every checkpoint, pruned weights are true zeros in plain parameters. (If another
    callback saves averages in place of the weights, the averages have the zeros once the masks are final.)

    Args:
        target_sparsity: fraction of all prunable weights to prune, in [0, 1). It is met exactly when the masks become
            final (with neurons, as closely from above as their sizes allow). None: the pressure alone decides.
        target_flops: with neurons, the fraction of the model's operations to keep, in (0, 1], in place of
            ``target_sparsity``. It is met by the model that ``shrink`` returns.
        granularity: ``"weight"``: one m per weight. ``"neuron"``: one m per channel, that is, per neuron or filter;
            channels that must be removed together share one. Neurons need the module's ``example_input_array``.
        cost: with neurons, what the pressure weighs each neuron by: the ``"parameters"`` or the ``"flops"`` that it
            costs. None: what the target counts.
        pressure: μ, how strongly M is pushed toward pruning, > 0, in units of the typical gradient of the loss. Without
            a target it is constant; with one it is where the controller starts.
        schedule: the path of the density to the target. ``"polynomial"``: a power of the time left that depends on the
            target; ``"cubic"``, ``"linear"``: a fixed power; or a function of progress in [0, 1], first density and
            target density that returns a density in (0, 1]. Without a target it has no effect.
        auxiliary_lr: η, > 0: how far all auxiliary steps of the run together move an m whose gradient is steady and of
            typical size. Each step takes an equal share. With single weights and the rule ``"adaptive"``, a run of K
            auxiliary steps moves it (K / 1500)^1.5 times as far, at most 10 times: see ``AdaptiveRule.reach``.
        pull: strength of an L1 penalty on W until the masks are final, >= 0; 0: none. With BatchNorm, 0.004 is a good
            value. Only layers whose scale the loss does not depend on have it, which their first 20 steps show. λ ·
            sgn(w) is added to their gradients, where λ is ``pull`` / target density · root mean square of all
            gradients; M follows the gradients without it. For ``target_sparsity`` with single weights.
        estimator: straight-through estimator h'(m), which stands in for the mask's derivative: ``"linear"``,
            ``"hard_sigmoid"``, ``"leaky_relu"``, ``"softplus"``, or a function of M.
        leaky_slope: slope of the estimator ``"leaky_relu"`` at m <= 0, in [0, 1].
        update_rule: ``"adaptive"`` (dL/dT · w and μ, divided by each weight's running root mean square of their sum),
            ``"autoprune"`` (the paper's, dL/dT · sgn(w)), ``"vanilla"`` (dL/dT · w, the plain chain rule), or an
            instance of an ``UpdateRule``.
        initial_m: ``"fisher"``: M starts at ``initial_scale`` · S / root mean square of S over all layers. S is
            abs(w) · ⁴√F; F is the mean square of the weight's gradient in the last 100 dense steps (1 without dense
            steps). ``"magnitude"``: at ``initial_scale`` · abs(w) / std(w) of its layer; ``"constant"``: at
            ``initial_scale``. Neurons start by magnitude under ``"fisher"``.
        initial_scale: size of the initial M, > 0.
        held_out: the data that M is trained on and W is not (``train_gradients`` adds the data of W). A fraction in (0,
            1): that fraction of the training data, see ``redraw_held_out``. ``"val"``: the validation loaders; masks
            are then fitted to what is reported. ``"train"``: nothing is held out, and M follows the gradients of the
            weight steps. A ``DataLoader``: its batches. None: 0.25 where samples can be held out, and ``"train"`` where
            they can't; a warning says why.
        redraw_held_out: True: a fraction is drawn anew from each batch, so that no data is lost and no more samples
            pass through the network than without pruning. False: it is one part of the training set for the whole run.
        train_gradients: whether M follows the gradients of the weight steps too, as one mean over the samples of both
            (with a loader's batches: half and half). None: yes if a fraction of each batch is held out and one
            optimizer trains all prunable weights.
        mask_every_n_steps: interval of the auxiliary steps in training steps, >= 1. Each is followed by an update of
            the masks.
        warmup: fraction of the run that is dense, in [0, 1]; 1 switches pruning off. None: 0.1 for a network that is
            trained already, which the training loss shows: by then it is at least 0.8 times its first value.
            Otherwise 0.25.
        finetune: fraction of the run with final masks, in [0, 1); ``warmup + finetune`` must be below 1.
        include: patterns (``fnmatch``) of the layers or parameters to prune. None: all linear, bilinear, convolution,
            recurrent, attention and expert layers. Embeddings and other parameters with two or more dimensions are
            pruned only if a pattern matches them.
        exclude: patterns of the layers or parameters to leave dense.
        layer_floor: fraction of its weights (or neurons) that each layer always keeps, in [0, 1); at least one.
        loss_fn: takes the module and a held-out batch and returns the loss. None: ``training_step`` is called, shielded
            so that it leaves the run untouched. Required for holding data out with manual optimization.
        log_every_n_steps: interval of the logs in training steps, >= 1. None: the Trainer's.
        log_layers: whether loggers get the sparsity of every layer, as ``autoprune/layer_sparsity/<layer>``, beside
            that of all layers together. Figures and ``callback.curves`` always have the layers.
        figures_every_n_epochs: when loggers get figures beside the curves, as
            :func:`~lightning_autoprune.training.loggers.figures.log_figures` says. 0: when fitting ends; n: also at the
            end of every n-th epoch; None: never.
        log_artifact: whether a ``WandbLogger`` gets the best pruned checkpoint when fitting ends, as an artifact of
            type ``model`` with the alias ``pruned``. Sparsity, operations and the monitored metric are its metadata.
        seed: seed of the draw of held-out samples, and of the random numbers in the held-out pass: an integer in [0,
            4294967295], as for ``seed_everything``.
        enabled: False switches the callback off: training is the same as without it, bit for bit.

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
        granularity: GranularityName = "weight",
        cost: Cost | None = None,
        pressure: float = 0.05,
        schedule: ScheduleName | Schedule = "polynomial",
        auxiliary_lr: float = 30.0,
        pull: float = 0.0,
        estimator: EstimatorName | Estimator = "linear",
        leaky_slope: float = 0.1,
        update_rule: UpdateRuleName | UpdateRule = "adaptive",
        initial_m: InitialM = "fisher",
        initial_scale: float = 0.1,
        held_out: float | Literal["val", "train"] | DataLoader | None = None,  # type: ignore[type-arg]
        redraw_held_out: bool = True,
        train_gradients: bool | None = None,
        mask_every_n_steps: int = 1,
        warmup: float | None = None,
        finetune: float = 0.35,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        layer_floor: float = 0.001,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        log_every_n_steps: int | None = None,
        log_layers: bool = True,
        figures_every_n_epochs: int | None = 0,
        log_artifact: bool = False,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        given = dict(locals())  # must come first, while the locals are only the arguments
        self.settings = CallbackSettings(**{entry.name: given[entry.name] for entry in fields(CallbackSettings)})
        self._held_out = HeldOutData(self.settings)
        self._is_in_use = False  # by a Trainer that fits, validates, tests or predicts
        self._has_logged_settings = False
        self._loaded: Mapping[str, Any] | None = None  # the state of a checkpoint, until training starts
        self._run: PruningRun | None = None
        self._last_run: PruningRun | None = None
        self._mailbox = Mailbox()  # gets the state of a run that ended in a process that the Trainer started

    @property
    def enabled(self) -> bool:
        """False if the callback does nothing: with ``enabled=False`` or ``warmup=1``."""
        return self.settings.enabled and self.settings.warmup != 1

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1); 0 before fitting.

        It is the fraction of zeros in the model's weights, ``sparsity(model)``, except in the cases that
        ``docs/logging.md`` lists.
        """
        return run.sparsity if (run := self._told_run) else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, by layer name; empty before fitting."""
        return run.layer_sparsity() if (run := self._told_run) else {}

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """The pairs (step, sparsity) of the run so far, by layer name and ``"all"``; for the plots."""
        return run.curves if (run := self._run or self._told_run) else {}

    def layers(self) -> list[LayerSummary]:
        """Return a row per layer: shape, weights, kept weights, operations, revived weights; empty before fitting."""
        return run.layers() if (run := self._told_run) else []

    @property
    def _told_run(self) -> PruningRun | FinishedRun | None:
        """The run whose weights the model has: of a restored checkpoint, of this process, or of one that it started."""
        if self._loaded:
            return FinishedRun(self._loaded)
        content = self._mailbox.content
        return FinishedRun(content["state"], content["shapes"]) if content and not self._run else self._run

    # Start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what can't work, before any data is loaded."""
        if not self.enabled:
            return
        check_package(trainer)
        self._is_in_use = True
        stage_settings(trainer, self.settings.hyperparameters())  # a validation before the fit may write them
        if stage != "fit":
            return
        self._loaded, self._last_run, self._run = None, self._run or self._last_run, None
        self._has_logged_settings, self._mailbox.content = False, None
        support = support_for(trainer)
        check_trainer(trainer, AutoPruneCallback, self.settings.held_out != "train")
        support.check_run(trainer, self.settings)
        self._held_out.setup(trainer, self._steps_done)

    def _steps_done(self) -> int:
        if self._loaded is not None:
            return int(self._loaded["pruner"]["step"])
        return run.pruner.step if (run := self._active_run) else 0

    @property
    def _active_run(self) -> PruningRun | None:
        """The run, while training is under way."""
        return self._run if self._run and self._run.is_training else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers and check the optimizers."""
        if not self.enabled:
            return
        choice = self._choose_weights(pl_module)
        weights, _ = self._trained_weights(trainer, choice)
        check_example(pl_module, self.settings.granularity)
        known = [*weights, *(self._loaded["left_dense"] if self._loaded else [])]
        warn_of_dense_weights(trainer, pl_module, choice, known, self.settings)

    def _trained_weights(
        self, trainer: Trainer, choice: WeightChoice
    ) -> tuple[dict[str, nn.Parameter], list[Optimizer]]:
        found = choice.weights
        weights = {name: weight for name, weight in found.items() if weight.requires_grad}
        if self._loaded:  # layers that were unfrozen may be frozen again for now
            pruned, dense = self._loaded["layers"], self._loaded["left_dense"]
            chosen = {*pruned, *weights}.difference(dense)
            # in the order of the checkpoint: a change of the code may have put them in another
            weights = {name: found[name] for name in [*pruned, *found] if name in chosen and name in found}
        support_for(trainer).check_weights(trainer, weights)
        joins_gradients = self._held_out.source.has_batches and bool(self.settings.train_gradients)
        trained, optimizers = select_trained_weights(trainer, weights, joins_gradients)
        if not trained:
            check_waiting(trainer, found, self.settings.granularity)
        return trained, optimizers

    def _choose_weights(self, pl_module: LightningModule) -> WeightChoice:
        choice = choose_weights(pl_module, self.settings.include, self.settings.exclude)
        return replace(choice, weights=without_averages(pl_module, choice.weights))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out the phases, restore a checkpoint's state if there is one, and hook into the optimizers."""
        if not self.enabled:
            return
        self._run = None
        self._held_out.start(trainer, self._loaded)
        weights, optimizers = self._trained_weights(trainer, self._choose_weights(pl_module))
        run = PruningRun(trainer, pl_module, weights, optimizers, self.settings, self._held_out)
        if self._loaded is not None:
            run.load_state_dict(self._loaded)
        self._run, self._loaded = run, None
        run.start()

    # Each step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prepare the weights; at the start of an epoch, record what was logged and take in unfrozen layers."""
        if not (run := self._active_run):
            return
        if not self._has_logged_settings:  # now that the first batch has shown what is held out
            self._has_logged_settings = True
            log_settings(trainer, run.hyperparameters())
        if batch_idx == 0:
            self._held_out.source.on_epoch_start(trainer)
            run.measure(late=True)
            run.take_in_unfrozen(lambda: self._choose_weights(pl_module).weights)
            run.validated_weights.remember_places()
        if overrides_hook(pl_module, "on_train_batch_end"):  # the module's hook may have written to pruned weights
            run.pruner.after_weight_step()
        run.pruner.before_forward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Step M if it follows these gradients, and mask them before they are clipped."""
        if run := self._active_run:
            run.before_weight_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step M on a held-out batch, update the masks, move on to the next phase, and report."""
        if not (run := self._active_run):
            return
        run.add_loss(outputs)
        if has_stepped(trainer):
            run.end_step()
        else:
            run.pruner.after_backward()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Zero pruned weights, which the module's own hooks may have written to, before validating and saving."""
        if run := self._active_run:
            run.follow_weights()
            run.validated_weights.before_validation()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look once, after all hooks of the start, whether what is validated is pruned."""
        if batch_idx == dataloader_idx == 0 and (run := self._active_run):
            run.validated_weights.before_first_batch()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metric that is followed alongside the sparsity."""
        if (run := self._active_run) and not trainer.sanity_checking:
            run.measure()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the followed metric, and log figures at the interval of the settings.

        Figures of the last epoch are logged when fitting ends.
        """
        if not (run := self._active_run):
            return
        run.measure()
        run.follow_weights()
        run.pruner.after_weight_step()
        every = self.settings.figures_every_n_epochs
        if not run.is_over and every and (trainer.current_epoch + 1) % every == 0:
            run.log_figures()

    # The end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if training ended before pruning did, and remove all hooks."""
        if run := self._active_run:
            run.measure(late=True)
            run.follow_weights(ended=True)
            run.warn_if_unfinished()
        self._release(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log figures, and the pruned checkpoint if asked for; the checkpoint callbacks have saved theirs by now."""
        if self._run is not None:
            self._run.follow_weights(ended=True)
            self._run.write_zeros()
            if self.settings.figures_every_n_epochs is not None:
                self._run.log_figures(ended=True)
            if self.settings.log_artifact:
                self._run.log_artifact()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove all hooks; pruned weights stay zero."""
        self._release(trainer)
        self._is_in_use = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove all hooks, if that has not happened yet."""
        self._is_in_use = False
        if stage == "fit":
            self._release(trainer)
            if not (self._run or self._loaded) and self._last_run and self._last_run.module is pl_module:
                self._run = self._last_run  # no step was left to train
            self._last_run = None
            if run := self._told_run:
                shapes = {row.name: row.shape for row in run.layers()}
                self._mailbox.send_from(trainer, {"state": self.state_dict(), "shapes": shapes})

    def _release(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.release()
        self._held_out.stop(trainer)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Return what a pickle or a copy is made of.

        One that is made while a Trainer uses the callback, as for spawned workers that are handed the Trainer, is
        switched off: it could neither have the run nor the user's functions.
        """
        return (_switched_off, (type(self),)) if self._is_in_use else super().__reduce_ex__(protocol)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs besides weights, optimizers and loops, as plain types and tensors."""
        if not self.enabled:
            return {}
        run = self._told_run  # that of a restored state, if training has not started since
        return run.state if isinstance(run, FinishedRun) else run.state_dict() if run else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until training starts, or go back to it if training is under way."""
        if not self.enabled:
            return
        if state_dict and (run := self._active_run):  # a learning-rate finder in the middle of a fit does this
            run.go_back(state_dict)
            return
        self._loaded = state_dict or None
        auxiliary = state_dict["pruner"]["auxiliary"] if state_dict else None
        if auxiliary and auxiliary["frozen"]:
            self._held_out.source.on_masks_final()  # before the training loader is made


def _switched_off(kind: type[AutoPruneCallback]) -> AutoPruneCallback:
    callback = kind.__new__(kind)
    AutoPruneCallback.__init__(callback, enabled=False)
    return callback
