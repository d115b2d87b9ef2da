"""``AutoPruneCallback``: the hooks that prune a model while Lightning trains it. Wiring, nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autoprune.auxiliary import InitialM, UpdateRule
from lightning_autoprune.errors import AutoPruneError, check_range
from lightning_autoprune.estimators import Estimator
from lightning_autoprune.layers import prunable_weights
from lightning_autoprune.pruner import Pruner, Settings
from lightning_autoprune.report import Report
from lightning_autoprune.shield import held_out_gradients
from lightning_autoprune.sources import Source, make_source

__all__ = ["AutoPruneCallback"]

_MAX_BAD_LOSSES = 10


class AutoPruneCallback(Callback):
    """Prunes the model while it trains: add it to the ``Trainer`` and set nothing, or one target.

    The run has three phases. First the model trains dense. Then auxiliary parameters M decide by their sign which
    weights are kept; they are trained on held-out data to lower the loss, under a pressure that prunes, and a pruned
    weight keeps its value and can come back. Last, the masks are frozen and the weights that are left train on all
    the data. At any moment, and in every checkpoint, pruned weights are true zeros in plain parameters.

    Args:
        target_sparsity: fraction of all prunable weights to prune, in [0, 1); met exactly when the masks are frozen.
            None: the pressure alone decides.
        pressure: μ, how strongly M is pushed towards pruning, > 0, in units of the typical gradient of the loss. It
            stays as it is without a target; with one it is where a controller starts.
        auxiliary_lr: η, > 0: how far all auxiliary steps of the run together move an m whose gradient is steady and of
            typical size. Each step takes its share, so the setting does not depend on the length of the run.
        estimator: straight-through estimator h'(m) that stands in for the mask's derivative.
        leaky_slope: slope of the estimator ``"leaky_relu"`` at m <= 0, in [0, 1].
        update_rule: ``"autoprune"`` (dL/dT · sgn(w)) or ``"vanilla"`` (dL/dT · w, the plain chain rule).
        initial_m: ``"magnitude"``: M starts at ``initial_scale`` · abs(w) / std(w) of its layer; ``"constant"``: at
            ``initial_scale``.
        initial_scale: size of the initial M, > 0.
        held_out: the data that M is trained on. A fraction in (0, 1): that share of the training data, see
            ``redraw_held_out``. ``"val"``: the validation loaders; masks are then fitted on what is reported.
            ``"train"``: nothing is held out and M follows the gradients of the weight steps themselves. A
            ``DataLoader``: its batches.
        redraw_held_out: whether a fraction is drawn anew from each batch (no data is lost and no more samples pass
            through the network than without pruning), or is one part of the training set for the whole run.
        mask_every_n_steps: an auxiliary step is taken, and the masks updated, every so many training steps, >= 1.
        warmup: fraction of the run that is dense, in [0, 1]; 1 switches pruning off.
        finetune: fraction of the run with frozen masks, in [0, 1); ``warmup + finetune`` must be below 1.
        include: layer-name patterns (``fnmatch``) to prune. None: all linear, convolution and attention layers.
        exclude: layer-name patterns to leave dense.
        layer_floor: share of its weights that each layer keeps whatever happens, in [0, 1); at least one weight.
        loss_fn: takes the module and a held-out batch and returns the loss. None: ``training_step`` is called, in a
            shield that leaves the run untouched. Needed for manual optimisation.
        log_every_n_steps: interval of the logs in training steps, >= 1. None: the Trainer's.
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
        pressure: float = 0.05,
        auxiliary_lr: float = 30.0,
        estimator: Estimator = "linear",
        leaky_slope: float = 0.1,
        update_rule: UpdateRule = "autoprune",
        initial_m: InitialM = "magnitude",
        initial_scale: float = 0.1,
        held_out: float | Literal["val", "train"] | DataLoader = 0.5,  # type: ignore[type-arg]
        redraw_held_out: bool = True,
        mask_every_n_steps: int = 1,
        warmup: float = 0.13,
        finetune: float = 0.34,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        layer_floor: float = 0.001,
        loss_fn: Callable[[LightningModule, Any], Tensor] | None = None,
        log_every_n_steps: int | None = None,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        self.settings = Settings(
            target_sparsity=target_sparsity,
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
            check_range("log_every_n_steps", log_every_n_steps, 1)
        self.include, self.exclude = include, exclude
        self.loss_fn, self.log_every_n_steps, self.seed = loss_fn, log_every_n_steps, seed
        self.enabled = enabled and warmup < 1
        self._source: Source | None = make_source(held_out, redraw_held_out, seed)
        self._handles: list[Any] = []  # not empty while the hooks are at work
        self._loaded: Mapping[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self._pruner: Pruner | None = None
        self._report = Report()
        self._bad_losses = 0

    @property
    def sparsity(self) -> float:
        """Fraction of all prunable weights that are pruned, in [0, 1); 0 before fitting."""
        return self._pruner.sparsity if self._pruner else 0.0

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are pruned, in [0, 1), by layer name; empty before fitting."""
        return self._pruner.layer_sparsity() if self._pruner else {}

    # Start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what can't work, before any data is loaded."""
        if stage != "fit" or not self.enabled:
            return
        if sum(isinstance(callback, AutoPruneCallback) for callback in _callbacks(trainer)) > 1:
            raise AutoPruneError(
                "The Trainer has two AutoPrune callbacks, which would prune the same weights: keep one."
            )
        if type(trainer.strategy).__name__ != "SingleDeviceStrategy":
            raise AutoPruneError(
                f"AutoPruneCallback does not work under {type(trainer.strategy).__name__} yet: use one process and one"
                " device (`Trainer(devices=1)`)."
            )
        if not pl_module.automatic_optimization and self.loss_fn is None and self._source is not None:
            raise AutoPruneError(
                f"{type(pl_module).__name__} uses manual optimisation: its `training_step` takes optimiser steps and"
                ' can\'t give the held-out loss. Pass `loss_fn`, or `held_out="train"`.'
            )
        if self._source is not None:
            self._source.setup(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers and checks the optimisers."""
        if self.enabled:
            self._forget()
            self._owners(trainer, prunable_weights(pl_module, self.include, self.exclude))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays out the phases, goes on from a checkpoint if there is one, and hooks into the optimisers."""
        if not self.enabled:
            return
        if self._source is not None:
            self._source.start(trainer, lambda: self._upcoming(trainer))
        weights = prunable_weights(pl_module, self.include, self.exclude)
        self._pruner = Pruner(weights, self.settings, _total_steps(trainer), _steps_done(trainer))
        if self._loaded is not None:
            self._pruner.load_state_dict(self._loaded["pruner"])
            self._report.load_state_dict(self._loaded["report"], weights.values())
            self._bad_losses = self._loaded["bad_losses"]
            if self._source is not None:
                self._source.load_state_dict(self._loaded["held_out"])
            self._loaded = None
        self._pruner.start()
        if self._pruner.frozen and self._source is not None:
            self._source.finetune()
        self._handles = [
            optimizer.register_step_post_hook(self._after_weight_step) for optimizer in self._owners(trainer, weights)
        ]

    def _owners(self, trainer: Trainer, weights: Mapping[str, Tensor]) -> list[Optimizer]:
        """The optimisers that train prunable weights."""
        ids = {id(weight) for weight in weights.values()}
        owners = [o for o in trainer.optimizers if any(id(p) in ids for g in o.param_groups for p in g["params"])]
        if not owners:
            raise AutoPruneError(
                f"No optimiser trains any of the prunable weights ({', '.join(weights)}): check `configure_optimizers`,"
                " `include` and `exclude`."
            )
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in owners):
            raise AutoPruneError(
                "LBFGS evaluates the loss several times within one step, and pruned weights would move in between: use"
                " a first-order optimiser (SGD, Adam, AdamW, …)."
            )
        if self._source is None and len(owners) > 1:
            raise AutoPruneError(
                f'`held_out="train"` takes the gradients of one optimiser\'s steps, and {len(owners)} optimisers train'
                " prunable weights: hold data out instead, or `include` the layers of one of them only."
            )
        return owners

    # Each step

    def _upcoming(self, trainer: Trainer) -> int | None:
        """The number of the training step that the batch being loaded ends, if an auxiliary step follows it."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready + 1
        ends = not trainer.lightning_module.automatic_optimization or ready % trainer.accumulate_grad_batches == 0
        return self._pruner.step if self._pruner and self._pruner.due and ends else None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Masks the gradients before they are clipped; under ``held_out="train"`` M is stepped on them first."""
        if not self._handles or self._pruner is None:
            return
        if self._source is None and self._pruner.due:
            weights = self._pruner.weights.values()
            self._auxiliary_step([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
        self._pruner.before_weight_step()

    def _after_weight_step(self, *_: Any) -> None:
        if self._pruner is not None:
            self._pruner.after_weight_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Steps M on a held-out batch, updates the masks, moves on to the next phase, and reports."""
        if not self._handles or self._pruner is None or not _has_stepped(trainer):
            return
        if self._source is not None and self._pruner.due:
            self._held_out_step(trainer, self._source)
        frozen_now = self._pruner.end_step()
        if frozen_now and self._source is not None:
            self._source.finetune()
        metrics = self._report.publish(trainer, 1 - self._pruner.sparsity, self._pruner.mu)
        if frozen_now or self._log_is_due(trainer):
            self._report.log(trainer, metrics, self._pruner.layer_sparsity(), self._pruner.masks())

    def _held_out_step(self, trainer: Trainer, source: Source) -> None:
        assert self._pruner is not None
        batch = source.batch(trainer)
        if batch is None:
            return
        weights = list(self._pruner.weights.values())
        result = held_out_gradients(trainer, batch, weights, self.loss_fn, self.seed, self._pruner.step)
        if isinstance(result, str):
            self._bad_loss(f"the held-out loss is {result}")
            return
        loss, gradients = result
        self._report.held_out_loss(loss)
        self._auxiliary_step(gradients)

    def _auxiliary_step(self, gradients: list[Tensor]) -> None:
        assert self._pruner is not None
        if self._pruner.auxiliary_step(gradients):
            self._bad_losses = 0
        else:
            self._bad_loss("the gradient for the auxiliary step is not finite")

    def _bad_loss(self, what: str) -> None:
        assert self._pruner is not None
        self._bad_losses += 1
        text = f"At training step {self._pruner.step} {what}"
        if self._bad_losses >= _MAX_BAD_LOSSES:
            raise AutoPruneError(f"{text}, for the {self._bad_losses}th time in a row: look at the data and the loss.")
        rank_zero_warn(f"{text}: no auxiliary step is taken, and training goes on.")

    def _log_is_due(self, trainer: Trainer) -> bool:
        assert self._pruner is not None
        if self.log_every_n_steps is None:
            return trainer._logger_connector.should_update_logs
        return self._pruner.step % self.log_every_n_steps == 0

    # The end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets pruned weights to 0 once more (other callbacks may have averaged weights), and lets go of the run."""
        if self._handles and self._pruner is not None:
            self._pruner.after_weight_step()
            if not self._pruner.frozen:
                rank_zero_warn(
                    f"Training ended after {self._pruner.step} of {self._pruner.phases.total} steps, before the masks"
                    f" were frozen: sparsity is {self._pruner.sparsity:.2%}. Resume to go on."
                )
        self._release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets go of the run; what has been pruned stays pruned."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets go of the run, if that has not happened yet."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._source is not None:
            self._source.stop(trainer)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights, the optimiser and the loops; plain types and tensors."""
        if self._pruner is None:
            return {}
        return {
            "pruner": self._pruner.state_dict(),
            "report": self._report.state_dict(),
            "held_out": self._source.state_dict() if self._source else {},
            "bad_losses": self._bad_losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's state until training starts."""
        self._loaded = state_dict or None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes sure of true zeros in what is saved (other callbacks may have put averaged weights there)."""
        if self._pruner is not None and self._pruner.auxiliary is not None:
            names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
            for weight, mask in zip(self._pruner.weights.values(), self._pruner.masks(), strict=True):
                name = names.get(id(weight))
                if name in checkpoint["state_dict"]:
                    saved = checkpoint["state_dict"][name]
                    checkpoint["state_dict"][name] = torch.where(mask.to(saved.device), saved, torch.zeros_like(saved))


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _total_steps(trainer: Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise AutoPruneError(
            "`warmup` and `finetune` are fractions of the run, whose length is not known: set `max_steps` of the"
            " Trainer, or `max_epochs` and a training loader that has a length."
        )
    return int(total)


def _steps_done(trainer: Trainer) -> int:
    """Number of batches that ended in an optimiser step, from an earlier fit or a checkpoint without our state."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _has_stepped(trainer: Trainer) -> bool:
    """Whether the batch that ends took an optimiser step, rather than only adding to the gradients."""
    return not (trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())
