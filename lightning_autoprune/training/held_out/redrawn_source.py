"""Holds out a share of each training batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from typing_extensions import override

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_splitting import (
    UnclearSamplesError,
    count_samples,
    hold_out,
    number_to_hold_out,
)
from lightning_autoprune.training.held_out.fixed_split import iterable_dataset_error
from lightning_autoprune.training.held_out.held_out_source import HeldOutSource
from lightning_autoprune.training.held_out.loaders import training_loaders
from lightning_autoprune.training.lightning_internals import is_moving_training_batch
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["RedrawnSource"]


class RedrawnSource(HeldOutSource):
    """Holds out a share of each training batch, drawn anew; W is not trained on these samples in that epoch.

    W trains on the rest of the batch. There are as many steps as without pruning, and no more samples pass through the
    network. Each of the two parts has at least two samples, which BatchNorm needs. A batch of fewer than four samples,
    such as the last of an epoch, is trained on whole, unless the first batch was as small. A later batch whose samples
    are unclear is trained on whole too, if no batch before it made them clear.

    Args:
        fraction: fraction of the samples of a batch, in (0, 1).
        seed: together with the number of the step, it decides which samples.
    """

    default_train_gradients = True

    def __init__(self, fraction: float, seed: int) -> None:
        super().__init__(seed)
        self.fraction = fraction
        self.description = f"{fraction} of each batch, seed {seed}"
        self._min_samples = 0  # of each part; 0 until a batch has been checked
        self._layouts: dict[str, str] = {}  # where the batches so far had their samples
        self._held_out: Any = None  # the held-out part of the batch under way

    @override
    def start(self, trainer: Trainer, upcoming_step: Callable[[], int | None]) -> None:
        loaders = training_loaders(trainer)
        if any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders):
            raise iterable_dataset_error()
        if len(loaders) > 1:
            raise AutoPruneError(
                f"There are {len(loaders)} training loaders, whose batches differ in size: no fraction can be held out."
                ' Pass `held_out=DataLoader(...)` or `held_out="train"`.'
            )
        original, self._min_samples, self._layouts = trainer.strategy.batch_to_device, 0, {}

        def batch_to_device(batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
            is_training_batch = is_moving_training_batch(trainer)  # asked first: the move may run the user's hooks
            batch = original(batch, device=device, dataloader_idx=dataloader_idx)
            return self._split(batch, upcoming_step(), trainer) if is_training_batch else batch

        trainer.strategy.batch_to_device = batch_to_device  # type: ignore[method-assign]

    def _split(self, batch: Any, step: int | None, trainer: Trainer) -> Any:
        """Set the held-out part of a training batch aside and return the rest, or the whole batch.

        Args:
            batch: the batch, on the model's device.
            step: the training step that the batch ends, if an auxiliary step follows it; else None.
            trainer: the trainer.
        """
        self._held_out = None
        if batch is None or (self._min_samples and step is None):  # Lightning skips a batch that is None
            return batch
        try:
            samples = count_samples(batch, self._layouts)
            count = number_to_hold_out(samples, self.fraction, min_samples=2)
            rest, held_out = hold_out(batch, samples, count, self.seed, step or 0, layouts=self._layouts)
        except UnclearSamplesError:
            if not self._min_samples:
                raise
            return batch
        smaller = min(count, samples - count)
        if not self._min_samples:
            self._check_first_batch(samples, smaller, trainer.lightning_module)
            self._min_samples = min(smaller, 2)
        if step is None or smaller < self._min_samples:
            return batch
        self._held_out, self.held_out_share = held_out, count / (samples * trainer.accumulate_grad_batches)
        return rest

    def _check_first_batch(self, samples: int, smaller: int, module: nn.Module) -> None:
        """Raise if the first batch is too small to be split.

        Args:
            samples: number of samples of the batch.
            smaller: number of samples of its smaller part.
            module: the module that is trained.
        """
        number = "1 sample" if samples == 1 else f"{samples} samples"
        start = f"`held_out={self.fraction}` of a training batch of {number} leaves one side"
        if smaller == 0:
            raise AutoPruneError(f'{start} empty: use a larger batch, or `held_out="train"`.')
        for name, norm in module.named_modules() if smaller == 1 else ():
            if isinstance(norm, nn.BatchNorm1d) and (norm.training or norm.running_mean is None):
                raise AutoPruneError(
                    f"{start} a single sample, of which the BatchNorm1d {name!r} can't take statistics: use a batch of"
                    ' at least four samples, `held_out="train"`, or `held_out=DataLoader(...)`.'
                )

    @override
    def next_batch(self, trainer: Trainer) -> Any:
        held_out, self._held_out = self._held_out, None
        return held_out

    @override
    def on_masks_final(self) -> None:
        self._min_samples = 1  # no batch is split from now on, so none needs to be checked

    @override
    def stop(self, trainer: Trainer) -> None:
        vars(trainer.strategy).pop("batch_to_device", None)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"least": self._min_samples, "layouts": dict(self._layouts)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._min_samples, self._layouts = state["least"], dict(state["layouts"])
