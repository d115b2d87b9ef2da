"""What is validated: the pruned weights, or values that other code puts in their place, such as an average."""

from __future__ import annotations

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.tensors.sharding import local_shard
from lightning_autoprune.training.lightning_internals import callbacks_of, overrides_hook
from lightning_autoprune.training.lightning_package import Trainer, WeightAveraging, both

__all__ = ["ValidatedWeights"]


class ValidatedWeights:
    """Keeps pruned weights zero in validations, and notices values of others in their place.

    A callback with an average may swap it for the weights when a validation starts, and swap it back afterwards. While
    masks still change, the average is left alone, since pruned weights may come back. Once they are final, pruned
    entries are set to 0 in whatever is validated.

    Args:
        trainer: the trainer.
        pruner: the pruner of its module.
    """

    def __init__(self, trainer: Trainer, pruner: Pruner) -> None:
        self._trainer, self._pruner = trainer, pruner
        self._places: dict[int, int] = {}  # the address of each weight's storage, by the weight's id
        self._has_warned = False

    def remember_places(self) -> None:
        """Remember where the weights are stored. Call it when they are the model's own."""
        self._places = self._find_places()

    def _find_places(self) -> dict[int, int]:
        return {id(weight): local_shard(weight).data_ptr() for weight in self._pruner.weights.values()}

    def before_validation(self) -> None:
        """Zero pruned weights, which hooks may have written to, unless another storage has taken the place of one."""
        places = self._find_places()
        if self._pruner.masks_final or all(self._places.get(key, place) == place for key, place in places.items()):
            self._pruner.after_weight_step()

    def before_first_batch(self) -> None:
        """Warn if what is about to be validated is not pruned; once the masks are final, prune it."""
        if self._pruner.pruned_are_zero():
            return
        if self._pruner.masks_final:
            self._pruner.after_weight_step()
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"Pruned weights are not 0 in this validation: {self._likely_cause()} puts other values in their place,"
                " such as an average of the weights. Until the masks are final, these are left as they are, and the"
                " metrics are not those of a pruned model. From then on, pruned weights are set to 0 in what is"
                " validated."
            )

    def _likely_cause(self) -> str:
        hooks = ("on_validation_start", "on_validation_epoch_start")
        likely = [
            type(callback).__name__
            for callback in callbacks_of(self._trainer)
            if any(overrides_hook(callback, hook) for hook in hooks)
            and (isinstance(callback, both(WeightAveraging)) or not _is_known(callback))
        ]
        return " or ".join(likely) or "another hook"


def _is_known(callback: object) -> bool:
    """Return True for a callback of Lightning or of this package; only its averages put other values in place."""
    return type(callback).__module__.split(".")[0] in ("lightning", "lightning_autoprune", "pytorch_lightning")
