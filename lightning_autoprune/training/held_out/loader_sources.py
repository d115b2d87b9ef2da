"""Sources that take whole batches from a loader: the user's, those of the validation, or one over a fixed split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler
from typing_extensions import override

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.random_state import isolated_random
from lightning_autoprune.training.held_out.batch_splitting import part_of_rank
from lightning_autoprune.training.held_out.batch_stream import HeldOutBatches, empty_loader_error, find_generators
from lightning_autoprune.training.held_out.fixed_split import FixedSplitSampler, split_loader
from lightning_autoprune.training.held_out.held_out_source import HeldOutSource
from lightning_autoprune.training.held_out.loaders import (
    ChainedLoaders,
    number_of_batches,
    rebuild_loader,
    to_device,
    validation_loaders,
)
from lightning_autoprune.training.held_out.overriding import MethodHook
from lightning_autoprune.training.lightning_internals import training_data_source
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["FixedSource", "LoaderSource", "ValidationSource"]


class LoaderSource(HeldOutSource):
    """Takes batches from a loader, again and again.

    Args:
        loader: an iterable of batches like those of the training; None if a subclass finds it later.
        seed: decides the order of the batches, and the random numbers of the transfer hooks.
    """

    live: Sequence[str] = ("_stream",)

    def __init__(self, loader: Any, seed: int) -> None:
        super().__init__(seed)
        self.loader = loader
        self.description = f"a DataLoader, seed {seed}"
        self._stream: HeldOutBatches | None = None

    @override
    def start(self, trainer: Trainer) -> None:
        loaders = self.loader.loaders if isinstance(self.loader, ChainedLoaders) else [self.loader]
        if all(isinstance(loader, DataLoader) and number_of_batches(loader) == 0 for loader in loaders):
            raise empty_loader_error()
        self._stream = HeldOutBatches(self.loader, self.seed, find_generators(loaders))

    @override
    def next_batch(self, trainer: Trainer) -> Any:
        assert self._stream is not None
        batch = self._take_rank_part(next(self._stream), trainer)
        with isolated_random(self.seed, self._stream.passes, self._stream.position):
            return to_device(trainer, batch)

    def _take_rank_part(self, batch: Any, trainer: Trainer) -> Any:
        """Return this rank's samples of a batch, and set their weight in the mean over the ranks.

        All ranks draw the same batch, unless the loader has a ``DistributedSampler``.
        """
        rank, ranks = trainer.global_rank, trainer.world_size
        if ranks == 1 or isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            return batch
        part, self.rank_weight = part_of_rank(batch, rank, ranks)
        return part

    @override
    def on_masks_final(self) -> None:
        self._stream = None

    @override
    def stop(self, trainer: Trainer) -> None:
        if self._stream:
            self._stream.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._stream.state_dict()) if self._stream else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "passes" in state and self._stream:
            self._stream.load_state_dict(state)


class ValidationSource(LoaderSource):
    """Takes batches from the user's validation loaders, in the order of a validation."""

    live = ("_stream", "loader")

    def __init__(self, seed: int) -> None:
        super().__init__(None, seed)
        self.description = f'"val", seed {seed}'

    @override
    def _take_rank_part(self, batch: Any, trainer: Trainer) -> Any:
        return batch  # Lightning gives each rank its own validation batches

    @override
    def start(self, trainer: Trainer) -> None:
        self.loader = validation_loaders(trainer)
        if self.loader is None:
            raise AutoPruneError(
                '`held_out="val"` needs validation data, and this fit has none: pass `val_dataloaders` to `fit`, or'
                " choose a fraction of the training data."
            )
        rank_zero_warn('`held_out="val"` fits the masks on the data that is reported: its metrics will look too good.')
        super().start(trainer)


class FixedSource(LoaderSource):
    """Holds out the same samples of the training set for the whole run, until the masks are final.

    Args:
        fraction: fraction of the samples, in (0, 1).
        seed: decides which samples, and the order of their batches.
    """

    live = ("_stream", "_hook")

    def __init__(self, fraction: float, seed: int) -> None:
        super().__init__(None, seed)
        self.fraction = fraction
        self.description = f"{fraction} of the training set for the whole run, seed {seed}"
        self._hook: MethodHook | None = None
        self._sampler: FixedSplitSampler | None = None
        self._masks_final = False

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            raise AutoPruneError(
                f"A fixed part of the training set can't be held out on {trainer.world_size} ranks, since each rank"
                " draws its own samples: use `redraw_held_out=True` or a DataLoader."
            )
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise AutoPruneError("`overfit_batches` of the Trainer replaces the sampler: use `redraw_held_out=True`.")
        self._masks_final = False

        def dataloader(original: Callable[[], Any]) -> DataLoader[Any]:
            split = split_loader(original(), self.fraction, self.seed, rebuild_loader, self.steps_done)
            self.loader, self._sampler = split.held_out, split.sampler
            self._sampler.redraw_each_epoch = self._masks_final
            return split.train

        self.stop(trainer)
        self._hook = MethodHook(training_data_source(trainer), "dataloader", dataloader)

    @override
    def on_masks_final(self) -> None:
        super().on_masks_final()
        self.loader, self._masks_final = None, True
        if self._sampler:
            self._sampler.redraw_each_epoch = True

    @override
    def stop(self, trainer: Trainer) -> None:
        super().stop(trainer)
        if self._hook:
            self._hook.remove()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": self._count_samples()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["rows"] != self._count_samples():
            raise AutoPruneError(
                f"The checkpoint's held-out split is of {state['rows']} training samples, and here there are"
                f" {self._count_samples()}: resume with the same training data, or start from the checkpoint's weights"
                " alone."
            )
        super().load_state_dict(state)

    def _count_samples(self) -> int:
        """Return the number of samples of the training set; 0 before its loader is made."""
        return len(self._sampler) + len(self._sampler.held_out) if self._sampler else 0
