"""What each strategy of the Trainer supports. A strategy without an entry is refused when fitting starts.

A subclass of a strategy counts as that strategy, unless it overrides a method that pruning relies on.

To add a strategy, write a :class:`StrategySupport` and give it an entry in :data:`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.granularity import GRANULARITIES
from lightning_autoprune.tensors.sharding import is_sharded
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.lightning_internals import callbacks_of, model_averaging_period
from lightning_autoprune.training.lightning_package import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    StochasticWeightAveraging,
    Strategy,
    Trainer,
    WeightAveraging,
    both,
)

__all__ = ["STRATEGIES", "StrategySupport", "support_for"]


class StrategySupport:
    """What pruning needs to check under a strategy whose weights are not sharded.

    Attributes:
        relied_on: methods and properties of the strategy that a subclass must not override. The loss and the gradients
            of the held-out pass are made without the strategy, and must be those that training would give. Each weight
            step must be one step of an optimizer on the masked gradients.
    """

    relied_on: tuple[str, ...] = (
        "training_step",
        "pre_backward",
        "backward",
        "post_backward",
        "optimizer_step",
        "handles_gradient_accumulation",
    )

    def check_run(self, trainer: Trainer, settings: CallbackSettings) -> None:
        """Raise for settings that do not work under the strategy, before any data is loaded.

        Raises:
            AutoPruneError: naming the setting or the callback, and the way out.
        """

    def check_weights(self, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
        """Raise for weights that can't be pruned under the strategy: here, for sharded ones.

        Raises:
            AutoPruneError: naming the layer.
        """
        for name, weight in weights.items():
            if is_sharded(weight):
                raise AutoPruneError(
                    f"Layer {name!r} is sharded, and under {type(trainer.strategy).__name__} only whole weights can be"
                    " pruned: use ModelParallelStrategy, or exclude the layer."
                )

    def check_unfrozen(self, trainer: Trainer) -> None:
        """Raise if a layer that is unfrozen during the run can't be pruned.

        Raises:
            AutoPruneError: saying why.
        """


class DDPSupport(StrategySupport):
    """Weights are the same on all ranks, and stay the same because all ranks take the same auxiliary steps."""

    def check_run(self, trainer: Trainer, settings: CallbackSettings) -> None:
        """Raise if the ranks' weights differ between averages."""
        if model_averaging_period(trainer) is not None:
            raise AutoPruneError(
                "DDPStrategy has a `model_averaging_period`: between two averages the weights of the ranks differ, and"
                " so would their masks. Leave it out."
            )

    def check_weights(self, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
        """Raise for sharded weights, and for several ranks whose gradients DDP does not average."""
        super().check_weights(trainer, weights)
        if trainer.world_size > 1 and not isinstance(trainer.strategy.model, DistributedDataParallel):
            raise AutoPruneError(
                f"{type(trainer.strategy).__name__} does not wrap the model in DistributedDataParallel, so the"
                " gradients of the ranks would differ, and so would their masks: leave `configure_ddp` as it is in"
                " DDPStrategy."
            )

    def check_unfrozen(self, trainer: Trainer) -> None:
        """Raise if there are several ranks."""
        if trainer.world_size > 1:
            raise AutoPruneError(
                "DDP does not share the gradients of parameters that were frozen, or not in the model, when fitting"
                " started."
            )


class FSDP2Support(StrategySupport):
    """Weights are sharded over all ranks by FSDP2, without tensor parallelism."""

    def check_run(self, trainer: Trainer, settings: CallbackSettings) -> None:
        """Raise for tensor parallelism, pruning of channels, an artifact, and averages of the weights."""
        assert isinstance(trainer.strategy, both(ModelParallelStrategy))
        if (ranks := trainer.strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise AutoPruneError(
                f"`tensor_parallel_size` of ModelParallelStrategy is {ranks}, and only weights that are sharded over"
                f" data-parallel ranks can be pruned: use `data_parallel_size={trainer.world_size},"
                " tensor_parallel_size=1`."
            )
        kinds = (both(WeightAveraging), both(StochasticWeightAveraging))
        averages = [c for c in callbacks_of(trainer) if isinstance(c, kinds)]
        problems = {
            f'`granularity="{settings.granularity}"`': GRANULARITIES[settings.granularity].prunes_channels,
            "`log_artifact=True`": settings.log_artifact,
            ", ".join(type(average).__name__ for average in averages): bool(averages),
        }
        for what, found in problems.items():
            if found:
                raise AutoPruneError(
                    f"{what} does not work with weights that are sharded (ModelParallelStrategy) yet: leave it out, or"
                    ' use `strategy="ddp"`.'
                )

    def check_weights(self, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
        """Raise unless each weight is sharded over all ranks, on the device that the model runs on."""
        for name, weight in weights.items():
            if not is_sharded(weight):
                raise AutoPruneError(
                    f"Layer {name!r} is not sharded, so its weights would differ between the ranks: apply"
                    " `fully_shard` to it or to a module around it in `configure_model`, or exclude the layer."
                )
            mesh = weight.device_mesh
            if mesh.size() < trainer.world_size or not all(place.is_shard() for place in weight.placements):
                raise AutoPruneError(
                    f"Layer {name!r} is not sharded over all {trainer.world_size} ranks, but laid out as"
                    f" {weight.placements} over {mesh.size()}: call `fully_shard` with"
                    ' `mesh=self.device_mesh["data_parallel"]`.'
                )
            if weight.device.type != trainer.strategy.root_device.type:
                raise AutoPruneError(
                    f"Layer {name!r} is on the {weight.device.type}, and the model runs on"
                    f" {trainer.strategy.root_device.type}: leave the `CPUOffloadPolicy` out."
                )


STRATEGIES: Mapping[type[Strategy], StrategySupport] = {
    SingleDeviceStrategy: StrategySupport(),
    DDPStrategy: DDPSupport(),
    ModelParallelStrategy: FSDP2Support(),
}
"""The strategies that work, and their subclasses that override nothing that is relied on."""

REFUSED: tuple[type[Strategy], ...] = (SingleDeviceXLAStrategy,)
"""Subclasses of strategies that work which do not work themselves."""


def support_for(trainer: Trainer) -> StrategySupport:
    """Return what the strategy of a Trainer supports.

    Raises:
        AutoPruneError: naming the strategy, and those that work, or what it overrides.
    """
    kind = type(trainer.strategy)
    supported = {known: support for strategy, support in STRATEGIES.items() for known in both(strategy)}
    refused = tuple(known for strategy in REFUSED for known in both(strategy))
    base = None if issubclass(kind, refused) else next((known for known in kind.__mro__ if known in supported), None)
    if base is None:
        raise AutoPruneError(
            f"AutoPruneCallback does not work under {kind.__name__} yet: use one device"
            ' (`Trainer(devices=1)`), `strategy="ddp"`, or FSDP2 by `ModelParallelStrategy`.'
        )
    support = supported[base]
    overridden = [name for name in support.relied_on if getattr(kind, name) is not getattr(base, name)]
    if overridden:
        raise AutoPruneError(
            f"AutoPruneCallback does not work under {kind.__name__}, which overrides"
            f" {', '.join(f'`{name}`' for name in overridden)} of {base.__name__}: pruning relies on what"
            f" {base.__name__} does there. Leave that out, or use {base.__name__}."
        )
    return support
