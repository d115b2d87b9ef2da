"""What is read of Lightning's loops and optimizers; its private members are behind the functions here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.fabric.utilities.data import _update_dataloader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_autoprune.errors import AutoPruneError

__all__ = [
    "average_model",
    "combine_like",
    "combined_validation_loader",
    "dump_weights",
    "grad_scaler",
    "has_stepped",
    "is_sequential",
    "logger_key",
    "metric_logs",
    "moves_training_batch",
    "owners",
    "replace_sampler",
    "run_transfer_hook",
    "scale_left",
    "steps_done",
    "total_steps",
    "training_data_source",
    "will_step",
]


def owners(trainer: Trainer) -> dict[int, Optimizer]:
    """The optimizer of each parameter, by the parameter's ``id``."""
    return {id(p): o for o in trainer.optimizers for group in o.param_groups for p in group["params"]}


def total_steps(trainer: Trainer) -> int:
    """Length of the run in training steps: batches that end in an optimizer step.

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
                f"{unknown}: with manual optimization `max_steps` counts the steps of the optimizer, of which a batch"
                " may have none or several. Set `max_epochs` instead."
            )
    total, epochs = trainer.estimated_stepping_batches, trainer.max_epochs
    if epochs not in (None, -1) and trainer.num_training_batches < math.inf:
        factors = [trainer.accumulate_grad_batches] * epochs
        for callback in _callbacks(trainer):
            if isinstance(callback, GradientAccumulationScheduler):
                factors = [callback.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
        for callback in _callbacks(trainer):
            if isinstance(callback, StochasticWeightAveraging):  # which may add an epoch without steps
                factors = factors[: callback._max_epochs]
        steps = sum(math.ceil(trainer.num_training_batches / factor) for factor in factors)
        total = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    if not 0 < total < math.inf:
        raise AutoPruneError(
            f"{unknown}: set `max_steps` of the Trainer, or `max_epochs` and a training loader that has a length"
            " (`max_time` may be set beside them)."
        )
    return int(total)


def steps_done(trainer: Trainer) -> int:
    """Number of training steps that are over, earlier fits included; what Lightning's loggers take for the step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def has_stepped(trainer: Trainer) -> bool:
    """Whether the batch that ends took an optimizer step, rather than only adding to the gradients."""
    return not (trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate())


def will_step(trainer: Trainer) -> bool:
    """Whether the batch that is being loaded will end in an optimizer step, as the last of an epoch always does."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    ready = progress.current.ready + 1
    return (
        not trainer.lightning_module.automatic_optimization
        or ready % trainer.accumulate_grad_batches == 0
        or ready == trainer.num_training_batches
        or progress.is_last_batch
    )


def moves_training_batch(trainer: Trainer) -> bool:
    """Whether it is Lightning that moves a batch now, to train on it, and not a hook of the user's that moves its own.

    Lightning names the hook it is in; ``batch_progress`` does not tell this move from one when an epoch starts or ends.
    """
    return trainer.training and trainer.lightning_module._current_fx_name == "batch_to_device"


def grad_scaler(trainer: Trainer) -> GradScaler | None:
    """What scales the loss in 16-bit precision, and skips steps whose gradients overflow; None if nothing does."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, GradScaler) and scaler.is_enabled() else None


def scale_left(scaler: GradScaler, optimizer: Optimizer) -> float:
    """What the gradients of an optimizer are multiplied by when its step begins.

    Nothing, as a rule. Fused optimizers take the scale out themselves, and Lightning leaves it in where the last
    ``training_step`` of an accumulation gave no loss.
    """
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return 1.0 if stage is OptState.UNSCALED else scaler.get_scale()


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def logger_key(logger: WandbLogger | TensorBoardLogger, name: str) -> str:
    """Return the name under which a logger files a scalar: with the logger's `prefix` in front, if it has one."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name


def dump_weights(trainer: Trainer) -> dict[str, Any]:
    """Return a checkpoint of the weights alone, made by the module's own hooks. Call it on all ranks."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=True)


def average_model(callback: WeightAveraging | StochasticWeightAveraging) -> nn.Module | None:
    """Return the averaged copy of the model that a callback keeps; None before it has made one."""
    return callback._average_model


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


def training_data_source(trainer: Trainer) -> Any:
    """Return Lightning's source of the training loader, whose `dataloader()` it calls whenever it needs a loader."""
    return trainer.fit_loop._data_source


def replace_sampler(loader: DataLoader[Any], sampler: Iterable[int]) -> DataLoader[Any]:
    """Make a loader like the given one with another sampler.

    Raises:
        MisconfigurationException, TypeError: if Lightning can't make another loader of that class.
    """
    return _update_dataloader(loader, sampler)


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
    result = CombinedLoader(combined.iterables, combined._mode)
    result.flattened = list(loaders)
    return result
