"""What each strategy of the Trainer supports. A strategy without an entry is refused when fitting starts.

To add a strategy, write a :class:`StrategySupport` and give it an entry in :data:`STRATEGIES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.granularity import GRANULARITIES
from lightning_autoprune.tensors.sharding import is_sharded
from lightning_autoprune.training.callback_settings import CallbackSettings
from lightning_autoprune.training.lightning_internals import callbacks_of, model_averaging_period

__all__ = ["STRATEGIES", "StrategySupport", "support_for"]


class StrategySupport:
    """What pruning needs to check under a strategy; by default nothing."""

    def check_run(self, trainer: Trainer, settings: CallbackSettings) -> None:
        """Raise for settings that do not work under the strategy, before any data is loaded.

        Raises:
            AutoPruneError: naming the setting or the callback, and the way out.
        """

    def check_weights(self, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
        """Raise for weights that can't be pruned under the strategy.

        Raises:
            AutoPruneError: naming the layer.
        """

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

    def check_unfrozen(self, trainer: Trainer) -> None:
        """Raise if there are several ranks."""
        if trainer.world_size > 1:
            raise AutoPruneError(
                "DDP does not share the gradients of parameters that were frozen when fitting started."
            )


class FSDP2Support(StrategySupport):
    """Weights are sharded over all ranks by FSDP2, without tensor parallelism."""

    def check_run(self, trainer: Trainer, settings: CallbackSettings) -> None:
        """Raise for tensor parallelism, pruning of channels, an artifact, and averages of the weights."""
        assert isinstance(trainer.strategy, ModelParallelStrategy)
        if (ranks := trainer.strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise AutoPruneError(
                f"`tensor_parallel_size` of ModelParallelStrategy is {ranks}, and only weights that are sharded over"
                f" data-parallel ranks can be pruned: use `data_parallel_size={trainer.world_size},"
                " tensor_parallel_size=1`."
            )
        averages = [c for c in callbacks_of(trainer) if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
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
"""By exact type: a subclass may move weights or gradients in its own way."""


def support_for(trainer: Trainer) -> StrategySupport:
    """Return what the strategy of a Trainer supports.

    Raises:
        AutoPruneError: naming the strategy, and those that work.
    """
    support = STRATEGIES.get(type(trainer.strategy))
    if support is None:
        raise AutoPruneError(
            f"AutoPruneCallback does not work under {type(trainer.strategy).__name__} yet: use one device"
            ' (`Trainer(devices=1)`), `strategy="ddp"`, or FSDP2 by `ModelParallelStrategy`.'
        )
    return support
