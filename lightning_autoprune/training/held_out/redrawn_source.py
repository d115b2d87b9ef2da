"""Holds out a share of each training batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.generators import preserve_generators
from lightning_autoprune.training.held_out.batch_splitting import (
    count_rows,
    draw_samples,
    number_to_hold_out,
    take_rows,
)
from lightning_autoprune.training.held_out.collated_batches import CollatedBatches
from lightning_autoprune.training.held_out.held_out_source import HeldOutError, HeldOutSource, RunUnderWay
from lightning_autoprune.training.held_out.loaders import to_device, training_loaders
from lightning_autoprune.training.held_out.overriding import MethodHook, original_of
from lightning_autoprune.training.held_out.sampled_batches import SampledBatches
from lightning_autoprune.training.lightning_internals import nest_batch, show_loaders
from lightning_autoprune.training.lightning_package import Trainer

__all__ = ["RedrawnSource"]


class RedrawnSource(HeldOutSource):
    """Holds out a share of each training batch, drawn anew; W is not trained on these samples in that epoch.

    W trains on the rest of the batch. There are as many steps as without pruning, and no more samples pass through the
    network. Each of the two parts has at least two samples, which BatchNorm needs. A batch of fewer than four samples,
    such as the last of an epoch, is trained on whole, unless the first batch was as small.

    Where a loader has index lists, the samples are drawn from these, so that a batch may be anything. Elsewhere they
    are rows of the tensors in the batch.

    Args:
        fraction: fraction of the samples of a batch, in (0, 1).
        seed: together with the number of the step, it decides which samples.
    """

    splits_batches = True
    default_train_gradients = True
    live = ("_trainer", "_hook", "_sampled", "_collated", "_run", "_held_out")

    def __init__(self, fraction: float, seed: int) -> None:
        super().__init__(seed)
        self.fraction = fraction
        self.description = f"{fraction} of each batch, seed {seed}"
        self._trainer: Trainer | None = None
        self._hook: MethodHook | None = None
        self._sampled: list[SampledBatches] = []
        self._collated: CollatedBatches | None = None
        self._run: RunUnderWay | None = None
        self._held_out: tuple[Any, float] | None = None  # rows of the batch under way, and their share of it
        self._min_samples = 0  # of each part; 0 until the first batch has been seen
        self._was_tried = self._is_over = False

    @override
    def setup(self, trainer: Trainer) -> None:
        self.stop(trainer)
        self._trainer, self._is_over = trainer, False
        self._hook = MethodHook(trainer.strategy, "process_dataloader", self._process_loader)

    def _process_loader(self, original: Callable[[Any], Any], loader: Any) -> Any:
        """Take the place of the strategy's ``process_dataloader``, the last that Lightning does to a loader."""
        loader = original(loader)
        is_training = self._trainer is not None and self._trainer.training
        if self._is_over or not is_training or not SampledBatches.can_split(loader):
            return loader
        for sampled in self._sampled:
            if sampled.loader is loader:  # its workers may be alive, and know this one
                return sampled.view
        sampled = SampledBatches(loader, self.fraction, self.seed, self._to_device)
        if self._run:  # `reload_dataloaders_every_n_epochs`
            self._stop_sampling()
            sampled.follow(self._run, self._try_indices, self._split_indices)
        self._sampled.append(sampled)
        return sampled.view

    @override
    def start(self, trainer: Trainer) -> None:
        self._min_samples, self._was_tried = 0, False
        loaders = training_loaders(trainer)
        used = [sampled for sampled in self._sampled if any(sampled.view is loader for loader in loaders)]
        unused = [sampled for sampled in self._sampled if sampled not in used]  # of a tuner's runs
        for sampled in [*unused, *(used if len(loaders) > 1 else [])]:
            sampled.stop()
        self._sampled = used
        self.on_epoch_start(trainer)
        if len(loaders) > 1:
            raise HeldOutError(f"there are {len(loaders)} training loaders, whose batches differ in size")
        if not used:
            self._collated = CollatedBatches(trainer, self._split_rows)

    @override
    def on_epoch_start(self, trainer: Trainer) -> None:
        show_loaders(trainer, original_of)

    @override
    def follow(self, run: RunUnderWay) -> None:
        self._run = run
        for sampled in self._sampled:
            sampled.follow(run, self._try_indices, self._split_indices)

    # The first batch

    def _try_indices(self, indices: Any) -> None:
        """Find out whether batches can be split, given the indices of the first one."""

        def load() -> list[Any]:
            if not (hasattr(indices, "__len__") and hasattr(indices, "__getitem__")):
                raise HeldOutError(f"the batch sampler gives a {type(indices).__name__} where a list of indices is due")
            self._check_number(len(indices))
            try:
                parts = None if self._was_tried else self._split_indices(indices, 0)
            except Exception as error:
                kind, problem = type(indices).__name__, f"{type(error).__name__}: {error}"
                raise HeldOutError(f"the indices of a batch, a {kind}, can't be divided: {problem}") from error
            return self._load(indices, *parts) if parts else []

        self._try(load)

    def _load(self, *lists: Any) -> list[Any]:
        """Load a batch for each of some lists of indices, as the held-out batches are loaded."""
        loader, following, batches = self._sampled[0].loader, self._sampled[0].following, []
        for indices in lists:
            following.add(indices)
        try:
            with preserve_generators(loader.dataset, loader.collate_fn):  # without workers, samples are loaded here
                for _ in lists:
                    batches.append(following.next_batch(0))
        except Exception as error:
            raise HeldOutError(f"a part of a batch can't be loaded: {type(error).__name__}: {error}") from error
        finally:
            following.close()
        return batches

    def _try(self, load: Callable[[], list[Any]]) -> None:
        """Try the split out, unless a checkpoint says that this was done.

        Args:
            load: returns the first batch, the rest of it and its held-out part; nothing if no trial is needed.
        """
        run = self._run
        assert run is not None
        error, batches = None, []
        try:
            batches = load()
        except HeldOutError as problem:
            error = problem
        try:
            if not run.all_ranks_agree(error is None):
                run.stop_holding_out(error or HeldOutError("the batches of another rank can't be split"))
                return
        finally:
            error = None  # its traceback refers to this frame: as a cycle, they would keep the loader's workers alive
        self._was_tried = True
        try:
            if batches:
                run.try_batches(*batches)
        except HeldOutError as problem:
            run.stop_holding_out(problem)

    def _check_number(self, samples: int) -> None:
        """Raise if the first batch is too small to be split."""
        if self._min_samples:
            return
        count = number_to_hold_out(samples, self.fraction, min_samples=2)
        smaller = min(count, samples - count)
        if smaller <= 0:
            number = "1 sample" if samples == 1 else f"{samples} samples"
            raise HeldOutError(f"{self.fraction} of a training batch of {number} leaves one side empty")
        self._min_samples = min(smaller, 2)

    # Every batch

    def _draw(self, samples: int, step: int) -> tuple[list[int], list[int]] | None:
        """Return the places of the samples to train on and of those to hold out; None if the batch stays whole."""
        count = number_to_hold_out(samples, self.fraction, min_samples=2)
        if min(count, samples - count) < max(self._min_samples, 1):
            return None
        return draw_samples(samples, count, self.seed, step)

    def _split_indices(self, indices: Any, step: int) -> tuple[Any, Any] | None:
        places = self._draw(len(indices), step)
        return places and (_choose(indices, places[0]), _choose(indices, places[1]))

    def _split_rows(self, batch: Any) -> Any:
        """Set the held-out rows of a collated training batch aside and return the rest, or the whole batch."""
        self._held_out, run = None, self._run
        if run is None or self._is_over:
            return batch
        if not (self._min_samples and self._was_tried):
            self._try(lambda: self._try_rows(batch))
        step = run.step()
        if self._is_over or not (run.ends_step(run.next_batch_index()) and run.is_due(step)):
            return batch
        try:
            rows = count_rows(batch)
        except AutoPruneError:
            return batch
        places = self._draw(rows, step)
        if places is None:
            return batch
        rest, held_out = places
        self._held_out = take_rows(batch, held_out), len(held_out) / rows
        return take_rows(batch, rest)

    def _try_rows(self, batch: Any) -> list[Any]:
        try:
            rows = count_rows(batch)
        except AutoPruneError as error:
            raise HeldOutError(str(error)) from None
        self._check_number(rows)
        places = None if self._was_tried else self._draw(rows, 0)
        # copies, which may be written to
        return [take_rows(batch, part) for part in (range(rows), *places)] if places else []

    @override
    def next_batch(self, trainer: Trainer) -> Any:
        found, self._held_out = self._held_out, None
        if self._sampled and self._run:
            found = self._sampled[0].next_batch(self._run.next_batch_index() - 1)
        if found is None:
            return None
        batch, share = found
        self.held_out_share = share / trainer.accumulate_grad_batches
        return batch

    def _to_device(self, batch: Any) -> Any:
        assert self._trainer is not None
        return to_device(self._trainer, nest_batch(self._trainer, batch))

    # The end

    @override
    def on_masks_final(self) -> None:
        self._min_samples, self._was_tried = 1, True  # nothing is split from now on
        self._leave_batches_whole()

    def _leave_batches_whole(self) -> None:
        self._is_over = True
        self._stop_sampling()
        if self._collated:
            self._collated.stop()

    def _stop_sampling(self) -> None:
        for sampled in self._sampled:
            sampled.stop()
        self._sampled = []

    @override
    def stop(self, trainer: Trainer) -> None:
        self._leave_batches_whole()
        if self._hook:
            self._hook.remove()
        self._hook = self._collated = self._run = self._trainer = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"least": self._min_samples, "tried": self._was_tried}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._min_samples, self._was_tried = state["least"], state["tried"]


def _choose(indices: Any, places: Sequence[int]) -> Any:
    """Return the indices at some places, in a container of the same kind if it is a usual one."""
    if isinstance(indices, (Tensor, np.ndarray)):
        return indices[torch.tensor(places)] if isinstance(indices, Tensor) else indices[np.asarray(places)]
    chosen = [indices[place] for place in places]
    return tuple(chosen) if type(indices) is tuple else chosen
