"""What is read of Lightning's loaders, and changed in them; its private parts are behind the functions here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.fabric.utilities.data import _update_dataloader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_stream import with_private_iterator

__all__ = [
    "Chain",
    "length",
    "rebuild_loader",
    "to_device",
    "training_loader_source",
    "training_loaders",
    "validation_loaders",
]


def training_loader_source(trainer: Trainer) -> Any:
    """Lightning's holder of the training loader; its ``dataloader()`` is called whenever one is wanted."""
    return trainer.fit_loop._data_source


def rebuild_loader(loader: DataLoader[Any], sampler: Iterable[int]) -> DataLoader[Any]:
    """A loader like the given one, subclasses included, with another sampler.

    Raises:
        AutoPruneError: if it is of a class that Lightning can't make another one of.
    """
    try:
        return _update_dataloader(loader, sampler)
    except (MisconfigurationException, TypeError) as error:
        raise AutoPruneError(
            "A fixed held-out fraction needs a loader that can be made anew with other rows, and a"
            f" {type(loader).__name__} can't: {error} Pass `held_out=DataLoader(...)` with data of its own, or"
            " `redraw_held_out=True`."
        ) from error


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Moves a batch to the model's device as the training loop does, through the user's transfer hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a fit, one by one."""
    return _one_by_one(trainer.train_dataloader)


def validation_loaders(trainer: Trainer) -> Chain | None:
    """The validation loaders of a fit, which Lightning makes when it first validates; None if there are none."""
    validation = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None and trainer.enable_validation:
        validation.setup_data()
    loaders = [loader for loader in _one_by_one(trainer.val_dataloaders) if loader is not None]
    combined = validation._combined_loader
    if combined is not None and combined._mode != "sequential":
        return SideBySide(combined)
    return Chain(loaders) if loaders else None


def _one_by_one(loaders: Any) -> list[Any]:
    return tree_leaves(loaders, is_leaf=lambda x: isinstance(x, DataLoader))


def length(loader: DataLoader[Any]) -> int | None:
    """Number of batches; None where it can't be known."""
    return None if isinstance(loader.dataset, IterableDataset) else len(loader)


class Chain:
    """Several loaders as one iterable, one after the other."""

    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from with_private_iterator(loader)


class SideBySide(Chain):
    """Loaders from each of which a batch is taken at a time, as Lightning's ``CombinedLoader`` does."""

    def __init__(self, combined: CombinedLoader) -> None:
        super().__init__(combined.flattened)
        self._combined = combined

    def __iter__(self) -> Iterator[Any]:
        combined = CombinedLoader(self._combined.iterables, self._combined._mode)
        combined.flattened = [with_private_iterator(loader) for loader in combined.flattened]
        for batch, *_ in combined:
            yield batch
