"""Held-out data under a Trainer: from where ``AutoPruneCallback`` takes the batches that train M.

Of Lightning's private parts this module touches the one method that :class:`RedrawnSource` shadows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from typing_extensions import override

from lightning_autoprune.errors import AutoPruneError, check_choice, check_range
from lightning_autoprune.tensors.random_state import isolated_random
from lightning_autoprune.training.held_out.batch_splitting import (
    UnclearRowsError,
    batch_rows,
    held_rows,
    hold_out,
    shard_batch,
)
from lightning_autoprune.training.held_out.batch_stream import HeldOutBatches, empty_error, generators_of
from lightning_autoprune.training.held_out.fixed_split import FixedSplitSampler, iterable_error, split_loader
from lightning_autoprune.training.held_out.loaders import (
    Chain,
    length,
    rebuild_loader,
    to_device,
    training_loader_source,
    training_loaders,
    validation_loaders,
)
from lightning_autoprune.training.lightning_internals import is_moving_training_batch

__all__ = [
    "FixedSource",
    "HeldOutSource",
    "LoaderSource",
    "RedrawnSource",
    "TrainSource",
    "ValidationSource",
    "make_source",
]


class HeldOutSource:
    """Where held-out batches come from."""

    name: str  # what it is, for messages
    clock: Callable[[], int] = int  # tells how many training steps are over; the callback sets it
    joins = False  # whether M follows the gradients of the weight steps too, if the user does not say
    holds_out = True  # whether there are any
    weight = 1.0  # of the last batch of this rank beside those of the others, 1 in the mean
    share = 0.5  # weight of the last batch's gradients where M follows those of the weight step too

    def setup(self, trainer: Trainer) -> None:
        """Called before the training data is loaded."""

    def start(self, trainer: Trainer, due: Callable[[], int | None]) -> None:
        """Called before the first step.

        Args:
            trainer: the trainer.
            due: gives the number of the coming training step if an auxiliary step follows it, else None.
        """

    def batch(self, trainer: Trainer) -> Any:
        """The next held-out batch on the model's device, or None if there is none this time."""
        raise NotImplementedError

    def finetune(self) -> None:
        """Called when the masks are final and no data needs to be held out any more."""

    def stop(self, trainer: Trainer) -> None:
        """Takes back all that ``setup`` and ``start`` changed in the trainer."""

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores it, after ``start``."""


class TrainSource(HeldOutSource):
    """Nothing is held out: M follows the weight steps."""

    name = '"train"'
    joins = True
    holds_out = False


class RedrawnSource(HeldOutSource):
    """Holds out a share of each training batch, drawn anew; W is not trained on those rows in that epoch.

    W is trained on the rest of the batch. There are as many steps as without pruning, and no more samples are
    passed through the network. Each part has at least two rows (BatchNorm needs them); a batch of fewer than four (the
    rest of an epoch) is trained on whole, unless the first batch was as small. So is a later batch that does not tell
    what its rows are, if none before it did.

    Args:
        fraction: share of the rows of a batch, in (0, 1).
        seed: decides which rows.
    """

    joins = True

    def __init__(self, fraction: float, seed: int) -> None:
        self.fraction, self.seed = fraction, seed
        self.name = f"{fraction} of each batch, seed {seed}"
        self._least = 0  # rows that each part must have; 0 until a batch has been seen
        self._layouts: dict[str, str] = {}  # where batches so far had their rows
        self._held: Any = None

    @override
    def start(self, trainer: Trainer, due: Callable[[], int | None]) -> None:
        loaders = training_loaders(trainer)
        if any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders):
            raise iterable_error()
        if len(loaders) > 1:
            raise AutoPruneError(
                f"There are {len(loaders)} training loaders, whose batches differ in size: no fraction can be held out."
                ' Pass `held_out=DataLoader(...)` or `held_out="train"`.'
            )
        original, self._least, self._layouts = trainer.strategy.batch_to_device, 0, {}

        def batch_to_device(batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
            own = is_moving_training_batch(trainer)
            batch = original(batch, device=device, dataloader_idx=dataloader_idx)
            return self._split(batch, due(), trainer) if own else batch

        trainer.strategy.batch_to_device = batch_to_device  # type: ignore[method-assign]

    def _split(self, batch: Any, step: int | None, trainer: Trainer) -> Any:
        self._held = None
        if batch is None or (self._least and step is None):  # Lightning skips a batch that is None
            return batch
        try:
            rows = batch_rows(batch, self._layouts)
            count = held_rows(rows, self.fraction, least=2)
            rest, held = hold_out(batch, rows, count, self.seed, step or 0, layouts=self._layouts)
        except UnclearRowsError:
            if not self._least:
                raise
            return batch
        smaller = min(count, rows - count)
        if not self._least:
            self._check(rows, smaller, trainer.lightning_module)
            self._least = min(smaller, 2)
        if step is None or smaller < self._least:
            return batch
        self._held, self.share = held, count / (rows * trainer.accumulate_grad_batches)
        return rest

    def _check(self, rows: int, smaller: int, module: nn.Module) -> None:
        """Raises for a first batch that is too small to be split."""
        start = f"`held_out={self.fraction}` of a training batch of {rows} rows leaves one side"
        if smaller == 0:
            raise AutoPruneError(f'{start} empty: use a larger batch, or `held_out="train"`.')
        for name, norm in module.named_modules() if smaller == 1 else ():
            if isinstance(norm, nn.BatchNorm1d) and (norm.training or norm.running_mean is None):
                raise AutoPruneError(
                    f"{start} a single row, of which the BatchNorm1d {name!r} can't take statistics: use a batch of at"
                    ' least four rows, `held_out="train"`, or `held_out=DataLoader(...)`.'
                )

    @override
    def batch(self, trainer: Trainer) -> Any:
        held, self._held = self._held, None
        return held

    @override
    def finetune(self) -> None:
        self._least = 1  # nothing will be split any more, so no batch needs to be checked

    @override
    def stop(self, trainer: Trainer) -> None:
        vars(trainer.strategy).pop("batch_to_device", None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"least": self._least, "layouts": dict(self._layouts)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._least, self._layouts = state["least"], dict(state["layouts"])


class LoaderSource(HeldOutSource):
    """Takes batches from a loader, again and again.

    Args:
        loader: an iterable of batches like those of training; None where a subclass finds it later.
        seed: decides their order.
    """

    def __init__(self, loader: Any, seed: int) -> None:
        self.loader, self.seed = loader, seed
        self.name = f"a DataLoader, seed {seed}"
        self._stream: HeldOutBatches | None = None

    @override
    def start(self, trainer: Trainer, due: Callable[[], int | None]) -> None:
        loaders = self.loader.loaders if isinstance(self.loader, Chain) else [self.loader]
        if all(isinstance(loader, DataLoader) and length(loader) == 0 for loader in loaders):
            raise empty_error()
        self._stream = HeldOutBatches(self.loader, self.seed, generators_of(loaders))

    @override
    def batch(self, trainer: Trainer) -> Any:
        assert self._stream is not None
        batch = self._shard(next(self._stream), trainer)
        with isolated_random(self.seed, self._stream.passes, self._stream.position):
            return to_device(trainer, batch)

    def _shard(self, batch: Any, trainer: Trainer) -> Any:
        """This rank's rows of a batch that all ranks have; all of them where some rank would have less than two."""
        rank, ranks = trainer.global_rank, trainer.world_size
        if ranks == 1 or isinstance(getattr(self.loader, "sampler", None), DistributedSampler):
            return batch
        part, self.weight = shard_batch(batch, rank, ranks)
        return part

    @override
    def finetune(self) -> None:
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
    """Takes batches from the user's own validation loaders, as validation runs through them."""

    def __init__(self, seed: int) -> None:
        super().__init__(None, seed)
        self.name = f'"val", seed {seed}'

    @override
    def _shard(self, batch: Any, trainer: Trainer) -> Any:
        return batch  # each rank has its own

    @override
    def start(self, trainer: Trainer, due: Callable[[], int | None]) -> None:
        self.loader = validation_loaders(trainer)
        if self.loader is None:
            raise AutoPruneError(
                '`held_out="val"` needs validation data, and this fit has none: pass `val_dataloaders` to `fit`, or'
                " choose a fraction of the training data."
            )
        rank_zero_warn('`held_out="val"` fits the masks on the data that is reported: its metrics will look too good.')
        super().start(trainer, due)


class FixedSource(LoaderSource):
    """Holds the same rows of the training set out for the whole run, until the masks are frozen.

    Args:
        fraction: share of the rows, in (0, 1).
        seed: decides which rows, and the order of their batches.
    """

    def __init__(self, fraction: float, seed: int) -> None:
        super().__init__(None, seed)
        self.fraction = fraction
        self.name = f"{fraction} of the training set for the whole run, seed {seed}"
        self._sampler: FixedSplitSampler | None = None
        self._finetune = False

    @override
    def setup(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            raise AutoPruneError(
                f"One part of the training set can't be held out for the whole run on {trainer.world_size} ranks, each"
                " of which draws its own rows: use `redraw_held_out=True` or a DataLoader."
            )
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            raise AutoPruneError("`overfit_batches` of the Trainer replaces the sampler: use `redraw_held_out=True`.")
        source = training_loader_source(trainer)
        original, self._finetune = source.dataloader, False

        def dataloader() -> DataLoader[Any]:
            loader, self.loader, self._sampler = split_loader(
                original(), self.fraction, self.seed, rebuild_loader, self.clock
            )
            self._sampler.finetune = self._finetune
            return loader

        source.dataloader = dataloader

    @override
    def finetune(self) -> None:
        super().finetune()
        self.loader, self._finetune = None, True
        if self._sampler:
            self._sampler.finetune = True

    @override
    def stop(self, trainer: Trainer) -> None:
        super().stop(trainer)
        vars(training_loader_source(trainer)).pop("dataloader", None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rows": self._rows()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["rows"] != self._rows():
            raise AutoPruneError(
                f"The checkpoint's held-out split is of {state['rows']} training rows, and here there are"
                f" {self._rows()}: resume with the same training data, or start from the checkpoint's weights alone."
            )
        super().load_state_dict(state)

    def _rows(self) -> int:
        return len(self._sampler) + len(self._sampler.held_out) if self._sampler else 0


def make_source(held_out: Any, redraw: bool, seed: int) -> HeldOutSource:
    """The source that ``held_out`` names.

    Raises:
        AutoPruneError: for anything but a fraction in (0, 1), ``"val"``, ``"train"`` or a ``DataLoader``.
    """
    if isinstance(held_out, str):
        check_choice("held_out", held_out, ("val", "train"))
        return ValidationSource(seed) if held_out == "val" else TrainSource()
    if isinstance(held_out, DataLoader):
        return LoaderSource(held_out, seed)
    hint = '`held_out` may also be "val", "train" or a DataLoader.'
    check_range("held_out", held_out, 0, 1, low_open=True, high_open=True, hint=hint)
    return RedrawnSource(held_out, seed) if redraw else FixedSource(held_out, seed)
