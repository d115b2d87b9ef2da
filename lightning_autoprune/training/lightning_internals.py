"""What is read from Lightning's loops, optimizers and connectors. All use of private members is in this module.

Lightning 2.6 is required, because private members may change with any release.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.utils._pytree import tree_unflatten
from torch.utils.data import DataLoader

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.lightning_package import (
    Callback,
    CombinedLoader,
    GradientAccumulationScheduler,
    LightningModule,
    StochasticWeightAveraging,
    TensorBoardLogger,
    Trainer,
    WandbLogger,
    WeightAveraging,
    both,
    is_overridden,
    submodule,
)

__all__ = [
    "average_model",
    "callbacks_of",
    "combine_like",
    "combined_validation_loader",
    "drop_metric",
    "dump_weights",
    "ends_step",
    "grad_scaler",
    "gradient_scale",
    "has_stepped",
    "is_moving_training_batch",
    "is_sequential",
    "iterated_loaders",
    "log_is_due",
    "logged_hyperparameters",
    "logger_key",
    "metric_logs",
    "model_averaging_period",
    "nest_batch",
    "next_batch_index",
    "optimizer_by_parameter",
    "overrides_hook",
    "replace_sampler",
    "run_transfer_hook",
    "set_metrics",
    "show_loaders",
    "steps_done",
    "total_steps",
    "training_data_source",
    "training_step_arguments",
]


# The Trainer


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a Trainer."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def model_averaging_period(trainer: Trainer) -> int | None:
    """Return the number of steps between two averages of the ranks' weights under DDP; None without averages."""
    return getattr(trainer.strategy, "_model_averaging_period", None)


def overrides_hook(owner: LightningModule | Callback, name: str) -> bool:
    """Return True if the class of a module or a callback, or the object itself, overrides a hook."""
    parents: tuple[type, ...] = (*both(LightningModule), *both(Callback))
    return is_overridden(name, owner, next(parent for parent in parents if isinstance(owner, parent)))


# Steps


def total_steps(trainer: Trainer) -> int:
    """Return the length of the run in training steps: batches that end in an optimizer step.

    Raises:
        AutoPruneError: if it can't be known before the run is over.
    """
    unknown = "`warmup` and `finetune` are fractions of the run, whose length is not known"
    if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        if len(trainer.optimizers) > 1:
            raise AutoPruneError(
                f"{unknown}: `max_steps` counts the steps of all optimizers. Set `max_epochs` instead."
            )
        if not trainer.lightning_module.automatic_optimization:
            raise AutoPruneError(
                f"{unknown}: with manual optimization, `max_steps` counts the optimizer's steps, and a batch may have"
                " none or several. Set `max_epochs` instead."
            )
    total, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    if epochs not in (None, -1) and trainer.num_training_batches < math.inf:
        factors = _accumulation_by_epoch(trainer, epochs)
        steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
        total = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    if not 0 < total < math.inf:
        raise AutoPruneError(
            f"{unknown}: set `max_steps` of the Trainer, or `max_epochs` with a training loader that has a length or an"
            " integer `limit_train_batches`, the number of batches per epoch (`max_time` may be set as well)."
        )
    return int(total)


def _accumulation_by_epoch(trainer: Trainer, epochs: int) -> list[int]:
    """Return the number of batches over which gradients are accumulated, for each epoch with optimizer steps."""
    factors = [trainer.accumulate_grad_batches] * epochs
    for callback in callbacks_of(trainer):
        if isinstance(callback, both(GradientAccumulationScheduler)):
            factors = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
    for callback in callbacks_of(trainer):
        if isinstance(callback, both(StochasticWeightAveraging)):  # it may add an epoch without optimizer steps
            factors = factors[: callback._max_epochs]
    return factors


def steps_done(trainer: Trainer) -> int:
    """Return the number of training steps that are over, earlier fits included, as Lightning's loggers count them."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def has_stepped(trainer: Trainer) -> bool:
    """Return True if the batch that ends took an optimizer step, rather than only adding to the gradients."""
    return not (trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())


def next_batch_index(trainer: Trainer) -> int:
    """Return the number in its epoch of the training batch that is loaded next, or being loaded."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready


def ends_step(trainer: Trainer, batch: int) -> bool:
    """Return True if a batch of this epoch ends in an optimizer step, given its number.

    The last batch of an epoch always does. (If the number of batches is not known, Lightning tells the last one just
    before it is moved to the device.)
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return (
        not trainer.lightning_module.automatic_optimization
        or (batch + 1) % trainer.accumulate_grad_batches == 0
        or batch + 1 == trainer.num_training_batches
        or (batch == progress.current.ready and progress.is_last_batch)
    )


def is_moving_training_batch(trainer: Trainer) -> bool:
    """Return True if Lightning moves a batch to train on it now, rather than when a user's hook moves its own.

    Lightning stores the name of the hook that it runs. ``batch_progress`` can't tell this move from a move when
    an epoch starts or ends.
    """
    return trainer.training and trainer.lightning_module._current_fx_name == "batch_to_device"


def training_step_arguments(trainer: Trainer, batch: Any) -> list[Any]:
    """Return what Lightning passes to ``training_step``: the batch, and its index if the method asks for it."""
    index = max(trainer.fit_loop.batch_idx, 0)  # -1 before the first batch of an epoch
    kwargs = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
    return list(kwargs.values())


# Optimizers


def optimizer_by_parameter(trainer: Trainer) -> dict[int, Optimizer]:
    """Return the optimizer of each parameter, by the parameter's ``id``."""
    return {id(p): o for o in trainer.optimizers for group in o.param_groups for p in group["params"]}


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """Return the loss scaler of 16-bit precision, which skips steps whose gradients overflow; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def gradient_scale(scaler: GradScaler | None, optimizer: Optimizer) -> float:
    """Return the factor that is still in the gradients of an optimizer when its step begins.

    It is usually 1, and always 1 without a scaler. Fused optimizers divide by the scale themselves, and Lightning
    leaves it in if the last ``training_step`` of an accumulation gave no loss.
    """
    if scaler is None:
        return 1.0
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return 1.0 if stage is OptState.UNSCALED else scaler.get_scale()


# Metrics


def log_is_due(trainer: Trainer) -> bool:
    """Return True if Lightning logs in this step."""
    return trainer._logger_connector.should_update_logs


def set_metrics(trainer: Trainer, metrics: Mapping[str, float], progress_bar: Mapping[str, float]) -> None:
    """Set metrics without ``self.log``, whose bookkeeping costs about half a millisecond per key and step."""
    connector = trainer._logger_connector
    connector._callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
    connector._progress_bar_metrics.update(progress_bar)


def drop_metric(trainer: Trainer, name: str) -> None:
    """Remove a metric that other callbacks can monitor, if it is there."""
    trainer._logger_connector._callback_metrics.pop(name, None)


def metric_logs(loop: Any, name: str) -> list[Any]:
    """Return Lightning's records of a metric that a loop logs, one per hook that logs it.

    Lightning keeps the records when the loop ends, and resets them (`has_reset`).

    Args:
        loop: the training epoch loop or the validation loop of a fit.
        name: the name of the metric in `callback_metrics`.
    """
    results = loop._results
    return [
        log for log in results.values() if any(name in results._forked_name(log, on_step) for on_step in (True, False))
    ]


# Loggers, checkpoints and other callbacks


def logged_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Return the hyperparameters of module and datamodule that Lightning logs when a run starts."""
    module, datamodule = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    owners = [owner for owner in (module, datamodule) if owner is not None and owner._log_hyperparams]
    found = {name: value for owner in owners for name, value in owner.hparams_initial.items()}
    return {name: value for name, value in found.items() if name != "_class_path"}  # LightningCLI's own


def logger_key(logger: WandbLogger | TensorBoardLogger, name: str) -> str:
    """Return the name under which a logger files a scalar: with the logger's `prefix` in front, if it has one."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name


def dump_weights(trainer: Trainer) -> dict[str, Any]:
    """Return a checkpoint of the weights alone, made by the module's own hooks. Call it on all ranks."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)


def average_model(callback: WeightAveraging | StochasticWeightAveraging) -> nn.Module | None:
    """Return the averaged copy of the model that a callback keeps; None before it has made one."""
    return callback._average_model


# Loaders


def training_data_source(trainer: Trainer) -> Any:
    """Return Lightning's source of the training loader, whose `dataloader()` it calls whenever it needs a loader."""
    return trainer.fit_loop._data_source


def show_loaders(trainer: Trainer, original_of: Callable[[Any], Any]) -> None:
    """Let `trainer.train_dataloader` return the user's loaders in place of those that Lightning iterates over.

    Args:
        trainer: the trainer, with its training loaders.
        original_of: returns the user's loader for one that stands in for it, and any other itself.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is not None:
        combined._iterables = tree_unflatten([original_of(loader) for loader in combined.flattened], combined._spec)


def nest_batch(trainer: Trainer, batch: Any) -> Any:
    """Return a batch of the only training loader as the training loop has it: nested like the user's loader."""
    combined = trainer.fit_loop._combined_loader
    return batch if combined is None else tree_unflatten([batch], combined._spec)


def iterated_loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders that Lightning iterates over, as a flat list."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def replace_sampler(loader: DataLoader[Any], sampler: Iterable[int]) -> DataLoader[Any]:
    """Make a loader like the given one with another sampler.

    Raises:
        MisconfigurationException, TypeError: if Lightning can't make another loader of that class.
    """
    updated: DataLoader[Any] = submodule("fabric.utilities.data")._update_dataloader(loader, sampler)
    return updated


def run_transfer_hook(trainer: Trainer, batch: Any) -> Any:
    """Run the user's `on_before_batch_transfer` on a batch, and return the result."""
    return trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)


def combined_validation_loader(trainer: Trainer) -> CombinedLoader | None:
    """Return the loader into which Lightning combines the validation loaders of a fit; None before it is set up."""
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def is_sequential(combined: CombinedLoader) -> bool:
    """Return True if the loaders run one after the other, False if each step takes a batch from each of them."""
    return combined._mode == "sequential"


def combine_like(combined: CombinedLoader, loaders: Sequence[Any]) -> CombinedLoader:
    """Combine loaders in the mode and the nesting of another combined loader, which stays as it is."""
    result = type(combined)(combined.iterables, combined._mode)
    result.flattened = list(loaders)
    return result
