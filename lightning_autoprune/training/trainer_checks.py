"""Which Trainers, modules and optimizers the callback refuses, before training starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.granularity import GRANULARITIES, GranularityName
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS
from lightning_autoprune.training.held_out.held_out_source import HeldOutError
from lightning_autoprune.training.lightning_internals import callbacks_of, optimizer_by_parameter
from lightning_autoprune.training.lightning_package import (
    Callback,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    ModelPruning,
    Trainer,
    both,
    find_package,
    is_param_in_hook_signature,
)
from lightning_autoprune.training.strategies import support_for

__all__ = [
    "check_monitors",
    "check_optimizers",
    "check_package",
    "check_trainer",
    "check_training_step",
    "check_waiting",
    "select_trained_weights",
]

_Weight = TypeVar("_Weight", bound=Tensor)


def check_package(trainer: Trainer) -> None:
    """Raise unless the Trainer is that of Lightning, in either package.

    Raises:
        AutoPruneError: naming the package that it is from.
    """
    if not isinstance(trainer, both(Trainer)):
        raise AutoPruneError(
            f"The Trainer is of {find_package(trainer)}, and AutoPruneCallback works with the Trainer of `lightning` or"
            " `pytorch_lightning`, version 2.6: install one of these, and make the Trainer and the module with it."
        )


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
    if any(isinstance(callback, both(ModelPruning)) for callback in callbacks):
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
        if isinstance(callback, (both(ModelCheckpoint), both(EarlyStopping))) and callback.monitor == HELD_OUT_LOSS:
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
    stops = isinstance(callback, both(EarlyStopping))
    if not stops or getattr(callback, "strict", True):
        also = ", or pass `strict=False`" if stops else ""
        raise AutoPruneError(
            f"{name} monitors {HELD_OUT_LOSS!r}, which is logged only while masks are being trained: not in the dense"
            f" phase, and not once masks are final. Monitor a metric of your own{also}."
        )


def select_trained_weights(
    trainer: Trainer, weights: Mapping[str, _Weight], joins_gradients: bool
) -> tuple[dict[str, _Weight], list[Optimizer]]:
    """Return the weights that an optimizer trains, and the optimizers that train them; both may be empty.

    Args:
        trainer: the trainer, with its optimizers.
        weights: prunable weights by layer name.
        joins_gradients: whether the user wants M to follow the weight steps beside held-out batches.

    Raises:
        AutoPruneError: if an optimizer can't work with masks, or if the gradients of several are to be joined with
            those of a held-out batch.
    """
    owners = optimizer_by_parameter(trainer)
    trained = {name: weight for name, weight in weights.items() if id(weight) in owners}
    optimizers = [o for o in trainer.optimizers if any(owners[id(weight)] is o for weight in trained.values())]
    check_optimizers(optimizers or trainer.optimizers)
    if joins_gradients and len(optimizers) > 1:
        raise AutoPruneError(
            f"`train_gradients=True` uses the gradients of one optimizer's steps, and {len(optimizers)} optimizers"
            " train prunable weights: leave it out, or `include` the layers of only one of them."
        )
    return trained, optimizers


def check_waiting(trainer: Trainer, names: Iterable[str], granularity: GranularityName) -> None:
    """Raise unless layers that are unfrozen later can be pruned then: no weight is trained when fitting starts.

    Args:
        trainer: the trainer, with its optimizers.
        names: the layers that could be pruned.
        granularity: which units are pruned.

    Raises:
        AutoPruneError: naming the layers, and why none of them can be pruned.
    """
    owners, why = optimizer_by_parameter(trainer), ""
    if not any(id(parameter) in owners for parameter in trainer.lightning_module.parameters()):
        why = "no optimizer has any parameter of the model"
    elif not GRANULARITIES[granularity].can_extend:
        why = f'with `granularity="{granularity}"`, channels are found when fitting starts'
    else:
        try:
            support_for(trainer).check_unfrozen(trainer)
        except AutoPruneError as error:
            why = str(error).rstrip(".")
    if why:
        raise AutoPruneError(
            f"No optimizer trains any of the prunable weights ({', '.join(names)}) when fitting starts, and none can be"
            f" pruned later: {why}. Check `configure_optimizers`, `include` and `exclude`."
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
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
