"""What a Trainer must be for the callback to work in it, and what the callback reads of its loops.

What a Trainer is refused for is here. Private members of Lightning and torch are read by
:func:`check_trainer`, :func:`steps_done`, :func:`has_stepped`, :func:`moves_training_batch`, :func:`will_step`,
:func:`total_steps` and :func:`scale_left`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.sharding import is_sharded
from lightning_autoprune.training.followed_metric import HELD_OUT_LOSS
from lightning_autoprune.training.lightning_internals import _callbacks, owners

__all__ = ["check_sharding", "check_shards", "check_trainer", "trained_weights"]

_T = TypeVar("_T", bound=Tensor)


def check_trainer(trainer: Trainer, kind: type[Callback], held_out: bool, loss_fn: bool) -> None:
    """Raises for what can't work, before any data is loaded.

    Args:
        trainer: the trainer that is about to fit.
        kind: the class of the pruning callback.
        held_out: whether data is held out.
        loss_fn: whether the user gave a loss function.

    Raises:
        AutoPruneError: for two pruning callbacks, a strategy or another callback that does not go with pruning, a
            ``training_step`` that can't give a held-out loss, and a monitor of the held-out loss that can't be met.
    """
    module, callbacks = trainer.lightning_module, _callbacks(trainer)
    if sum(isinstance(callback, kind) for callback in callbacks) > 1:
        raise AutoPruneError("The Trainer has two AutoPrune callbacks, which would prune the same weights: keep one.")
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        raise AutoPruneError(
            "The Trainer has Lightning's ModelPruning too, which puts masks of its own over the same weights: keep one."
        )
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy):
        raise AutoPruneError(
            f"AutoPruneCallback does not work under {type(trainer.strategy).__name__} yet: use one device"
            ' (`Trainer(devices=1)`), `strategy="ddp"`, or FSDP2 by `ModelParallelStrategy`.'
        )
    if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
        raise AutoPruneError(
            "DDPStrategy has a `model_averaging_period`: between two averages the weights of the ranks differ, and so"
            " would their masks. Leave it out."
        )
    if held_out and not loss_fn and not module.automatic_optimization:
        raise AutoPruneError(
            f"{type(module).__name__} uses manual optimization: its `training_step` takes optimizer steps and can't"
            ' give the held-out loss. Pass `loss_fn`, or `held_out="train"`.'
        )
    if held_out and is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise AutoPruneError(
            f"`training_step` of {type(module).__name__} takes a `dataloader_iter`, of which no batch can be held out:"
            ' take a `batch`, or pass `held_out="train"`.'
        )
    _check_monitors(callbacks, held_out)


def _check_monitors(callbacks: Sequence[Callback], held_out: bool) -> None:
    """Raises for callbacks that stop a run where there is no held-out loss, or wait for one that never comes."""
    for callback in callbacks:
        if not isinstance(callback, (ModelCheckpoint, EarlyStopping)) or callback.monitor != HELD_OUT_LOSS:
            continue
        name = type(callback).__name__
        if not held_out:
            raise AutoPruneError(
                f'{name} monitors {HELD_OUT_LOSS!r}, and with `held_out="train"` there is none: monitor a metric of'
                " your own."
            )
        if isinstance(callback, ModelCheckpoint) or callback.strict:
            also = "" if isinstance(callback, ModelCheckpoint) else ", or pass `strict=False`"
            raise AutoPruneError(
                f"{name} monitors {HELD_OUT_LOSS!r}, which there is only while M is trained, neither in the dense phase"
                f" nor once the masks are final: monitor a metric of your own{also}."
            )


def check_sharding(trainer: Trainer, neurons: bool, artifact: bool) -> None:
    """Raises for what does not go with weights that are sharded, before any data is loaded.

    Args:
        trainer: the trainer that is about to fit; other strategies than ``ModelParallelStrategy`` pass.
        neurons: whether neurons are pruned.
        artifact: whether the pruned checkpoint is to be an artifact.

    Raises:
        AutoPruneError: for tensor parallelism, neurons, an artifact, and averages of the weights.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    if (ranks := trainer.strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise AutoPruneError(
            f"`tensor_parallel_size` of ModelParallelStrategy is {ranks}, and weights are pruned that are sharded over"
            f" data-parallel ranks alone: use `data_parallel_size={trainer.world_size}, tensor_parallel_size=1`."
        )
    averages = [c for c in _callbacks(trainer) if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    problems = {
        '`granularity="neuron"`': neurons,
        "`log_artifact=True`": artifact,
        ", ".join(type(average).__name__ for average in averages): bool(averages),
    }
    for what, found in problems.items():
        if found:
            raise AutoPruneError(
                f"{what} does not work with weights that are sharded (ModelParallelStrategy) yet: leave it out, or use"
                ' `strategy="ddp"`.'
            )


def check_shards(trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """Raises unless each weight is sharded over all ranks, if the strategy is ``ModelParallelStrategy``.

    Raises:
        AutoPruneError: naming the layer.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    for name, weight in weights.items():
        if not is_sharded(weight):
            raise AutoPruneError(
                f"Layer {name!r} is not sharded, so that its weights would differ between the ranks: apply"
                " `fully_shard` to it or to a module around it in `configure_model`, or exclude the layer."
            )
        mesh = weight.device_mesh
        if mesh.size() < trainer.world_size or not all(place.is_shard() for place in weight.placements):
            raise AutoPruneError(
                f"Layer {name!r} is not sharded over all {trainer.world_size} ranks but laid out as"
                f" {weight.placements} over {mesh.size()}: call `fully_shard` with"
                ' `mesh=self.device_mesh["data_parallel"]`.'
            )
        if weight.device.type != trainer.strategy.root_device.type:
            raise AutoPruneError(
                f"Layer {name!r} is on the {weight.device.type}, and the model runs on"
                f" {trainer.strategy.root_device.type}: leave the `CPUOffloadPolicy` out."
            )


def trained_weights(
    trainer: Trainer, weights: Mapping[str, _T], train_gradients: str | None
) -> tuple[dict[str, _T], list[Optimizer]]:
    """The weights that an optimizer trains, and the optimizers that train them.

    Args:
        trainer: the trainer, with its optimizers.
        weights: prunable weights by layer name.
        train_gradients: the setting that needs the gradients of the weight steps, if one does.

    Raises:
        AutoPruneError: if there is none, if LBFGS or a schedule-free optimizer is among them, or if there are several
            where the gradients of their steps are needed.
    """
    owned = owners(trainer)
    trained = {name: weight for name, weight in weights.items() if id(weight) in owned}
    found = [o for o in trainer.optimizers if any(owned[id(weight)] is o for weight in trained.values())]
    if not found:
        raise AutoPruneError(
            f"No optimizer trains any of the prunable weights ({', '.join(weights)}): check `configure_optimizers`,"
            " `include` and `exclude`."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in found):
        raise AutoPruneError(
            "LBFGS evaluates the loss several times within one step, and pruned weights would move in between: use a"
            " first-order optimizer (SGD, Adam, AdamW, …)."
        )
    for optimizer in found:
        if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
            raise AutoPruneError(
                f"{type(optimizer).__name__} evaluates the loss twice within one step (it has a `first_step()` and a"
                " `second_step()`), and pruned weights would move in between: use a first-order optimizer that steps"
                " once (SGD, Adam, AdamW, …)."
            )
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise AutoPruneError(
                f"{type(optimizer).__name__} has weights of its own that it puts in place for evaluation (it has a"
                " `train()` and an `eval()`), which are not pruned: use an optimizer without, and a learning-rate"
                " schedule."
            )
    if train_gradients and len(found) > 1:
        raise AutoPruneError(
            f"`{train_gradients}` takes the gradients of one optimizer's steps, and {len(found)} optimizers train"
            " prunable weights: hold data out instead, or `include` the layers of one of them only."
        )
    return trained, found
