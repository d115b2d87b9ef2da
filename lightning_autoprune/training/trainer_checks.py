"""Which Trainers, modules and optimizers the callback refuses, before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS
from lightning_autoprune.training.held_out.held_out_source import HeldOutError
from lightning_autoprune.training.lightning_internals import callbacks_of, optimizer_by_parameter

__all__ = ["check_monitors", "check_trainer", "check_training_step", "select_trained_weights"]

_Weight = TypeVar("_Weight", bound=Tensor)


def check_trainer(trainer: Trainer, kind: type[Callback], holds_out: bool) -> None:
    """Raise for what can't work, before any data is loaded.

    Args:
        trainer: the trainer that is about to fit.
        kind: the class of the pruning callback.
        holds_out: whether data is held out.

    Raises:
        AutoPruneError: for two pruning callbacks, another callback that does not go with pruning, and a monitor of the
            held-out loss that would stop the run.
    """
    callbacks = callbacks_of(trainer)
    if sum(isinstance(callback, kind) for callback in callbacks) > 1:
        raise AutoPruneError("The Trainer has two AutoPrune callbacks, which would prune the same weights: keep one.")
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise AutoPruneError(
            "The Trainer also has Lightning's ModelPruning, which puts its own masks over the same weights: keep one."
        )
    check_monitors(trainer, holds_out)


def check_monitors(trainer: Trainer, holds_out: bool) -> None:
    """Raise for a monitor of the held-out loss that would stop the run.

    Args:
        trainer: the trainer that is about to fit.
        holds_out: whether data is held out.

    Raises:
        AutoPruneError: naming the callback that monitors it.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor == HELD_OUT_LOSS:
            _check_monitor(callback, holds_out)


def check_training_step(module: LightningModule, has_loss_fn: bool) -> None:
    """Raise if a module can't give a held-out loss.

    Args:
        module: the module.
        has_loss_fn: whether the user gave a loss function.

    Raises:
        HeldOutError: saying why.
    """
    name = type(module).__name__
    if not has_loss_fn and not module.automatic_optimization:
        raise HeldOutError(
            f"{name} uses manual optimization, so its `training_step` takes optimizer steps and can't give the held-out"
            " loss",
            'Pass `loss_fn`, or `held_out="train"`, which holds nothing out.',
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise HeldOutError(
            f"`training_step` of {name} takes a `dataloader_iter`, not a batch",
            'Take a `batch`, or pass `held_out="train"`, which holds nothing out.',
        )


def _check_monitor(callback: ModelCheckpoint | EarlyStopping, holds_out: bool) -> None:
    """Raise for a callback that would stop the run because there is no held-out loss, or wait for it in vain."""
    name = type(callback).__name__
    if not holds_out:
        raise AutoPruneError(
            f'{name} monitors {HELD_OUT_LOSS!r}, which is not logged with `held_out="train"`: monitor a metric of your'
            " own."
        )
    if isinstance(callback, ModelCheckpoint) or callback.strict:
        also = "" if isinstance(callback, ModelCheckpoint) else ", or pass `strict=False`"
        raise AutoPruneError(
            f"{name} monitors {HELD_OUT_LOSS!r}, which is logged only while masks are being trained: not in the dense"
            f" phase, and not once masks are final. Monitor a metric of your own{also}."
        )


def select_trained_weights(
    trainer: Trainer, weights: Mapping[str, _Weight], needs_train_gradients: str | None
) -> tuple[dict[str, _Weight], list[Optimizer]]:
    """Return the weights that an optimizer trains, and the optimizers that train them.

    Args:
        trainer: the trainer, with its optimizers.
        weights: prunable weights by layer name.
        needs_train_gradients: the setting that needs the gradients of the weight steps, if one does.

    Raises:
        AutoPruneError: if no weight is trained, if an optimizer can't work with masks, or if there are several
            optimizers and the gradients of their steps are needed.
    """
    owners = optimizer_by_parameter(trainer)
    trained = {name: weight for name, weight in weights.items() if id(weight) in owners}
    optimizers = [o for o in trainer.optimizers if any(owners[id(weight)] is o for weight in trained.values())]
    if not optimizers:
        raise AutoPruneError(
            f"No optimizer trains any of the prunable weights ({', '.join(weights)}): check `configure_optimizers`,"
            " `include` and `exclude`."
        )
    _check_optimizers(optimizers)
    if needs_train_gradients and len(optimizers) > 1:
        raise AutoPruneError(
            f"`{needs_train_gradients}` uses the gradients of one optimizer's steps, and {len(optimizers)} optimizers"
            " train prunable weights: hold data out instead, or `include` the layers of only one of them."
        )
    return trained, optimizers


def _check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Raise for an optimizer that evaluates the loss several times per step, or has weights of its own."""
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if isinstance(optimizer, torch.optim.LBFGS):
            raise AutoPruneError(
                "LBFGS evaluates the loss several times within one step, and pruned weights would move in between: use"
                " a first-order optimizer (SGD, Adam, AdamW, …)."
            )
        if _has_methods(optimizer, "first_step", "second_step"):
            raise AutoPruneError(
                f"{name} evaluates the loss twice within one step (it has a `first_step()` and a `second_step()`), and"
                " pruned weights would move in between: use a first-order optimizer that steps once (SGD, Adam, AdamW,"
                " …)."
            )
        if _has_methods(optimizer, "train", "eval"):
            raise AutoPruneError(
                f"{name} puts weights of its own in place for evaluation (it has a `train()` and an `eval()`), and they"
                " are not pruned: use an optimizer without them, and a learning-rate schedule."
            )


def _has_methods(optimizer: Optimizer, *names: str) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in names)
