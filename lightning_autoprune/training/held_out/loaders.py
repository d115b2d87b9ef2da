"""The training and validation loaders of a fit: finding them, rebuilding them, and moving their batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_stream import with_private_iterator
from lightning_autoprune.training.lightning_internals import (
    combine_like,
    combined_validation_loader,
    is_sequential,
    iterated_loaders,
    replace_sampler,
    run_transfer_hook,
)
from lightning_autoprune.training.lightning_package import CombinedLoader, MisconfigurationException, Trainer, both

__all__ = [
    "ChainedLoaders",
    "SideBySideLoaders",
    "number_of_batches",
    "rebuild_loader",
    "to_device",
    "training_loaders",
    "validation_loaders",
]

_CANNOT_REBUILD: tuple[type[Exception], ...] = (*both(MisconfigurationException), TypeError)


def training_loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders that Lightning iterates over, as a flat list."""
    return iterated_loaders(trainer)


def validation_loaders(trainer: Trainer) -> ChainedLoaders | None:
    """Return the validation loaders of a fit as one iterable of batches; None if there are none.

    Lightning sets them up when it first validates. If it has not yet, they are set up now.
    """
    if trainer.val_dataloaders is None and trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
    loaders = [loader for loader in _flat_list(trainer.val_dataloaders) if loader is not None]
    combined = combined_validation_loader(trainer)
    if combined is not None and not is_sequential(combined):
        return SideBySideLoaders(combined)
    return ChainedLoaders(loaders) if loaders else None


def _flat_list(loaders: Any) -> list[Any]:
    return tree_leaves(loaders, is_leaf=lambda x: isinstance(x, DataLoader))


def number_of_batches(loader: DataLoader[Any]) -> int | None:
    """Return the number of batches of a loader; None if its dataset is iterable, so that it can't be known."""
    return None if isinstance(loader.dataset, IterableDataset) else len(loader)


def rebuild_loader(loader: DataLoader[Any], sampler: Iterable[int]) -> DataLoader[Any]:
    """Make a loader of the same class and settings with another sampler.

    Raises:
        AutoPruneError: if Lightning can't make another loader of that class.
    """
    try:
        return replace_sampler(loader, sampler)
    except _CANNOT_REBUILD as error:
        raise AutoPruneError(
            "A fixed held-out fraction needs a loader that can be rebuilt with other samples, and a"
            f" {type(loader).__name__} can't: {error} Pass `held_out=DataLoader(...)` with other data, or"
            " `redraw_held_out=True`."
        ) from error


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the model's device as the training loop does, through the user's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = run_transfer_hook(trainer, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


class ChainedLoaders:
    """Several loaders as one iterable of batches, one loader after the other."""

    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from with_private_iterator(loader)


class SideBySideLoaders(ChainedLoaders):
    """Several loaders as one iterable that takes a batch from each at a time, like Lightning's ``CombinedLoader``."""

    def __init__(self, combined: CombinedLoader) -> None:
        super().__init__(combined.flattened)
        self._combined = combined

    def __iter__(self) -> Iterator[Any]:
        loaders = [with_private_iterator(loader) for loader in self._combined.flattened]
        for batch, *_ in combine_like(self._combined, loaders):
            yield batch
