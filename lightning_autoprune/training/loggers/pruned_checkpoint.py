"""Which of the saved checkpoints is the best that has the final masks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.checkpoint_reader import find_pruning_state
from lightning_autoprune.tensors.bitmasks import pack

__all__ = ["_best", "_equal", "_is_pruned"]


def _best(trainer: Trainer, pruner: Pruner) -> tuple[Path | None, dict[str, float]]:
    """The file, and the figure that it was chosen by."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    zeros = {names[id(weight)]: (weight == 0).cpu() for weight in pruner.weights.values()}
    masks = [pack(mask) for mask in pruner.each_mask()]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for checkpoint in checkpoints:
        if checkpoint.monitor:
            sign = 1 if checkpoint.mode == "min" else -1
            for path, value in sorted(checkpoint.best_k_models.items(), key=lambda item: sign * float(item[1])):
                if _is_pruned(path, zeros, masks):
                    return Path(path), {checkpoint.monitor: float(value)}
    for checkpoint in checkpoints:
        for path in (checkpoint.last_model_path, checkpoint.best_model_path):
            if path and _is_pruned(path, zeros, masks):
                return Path(path), {}
    return None, {}


def _is_pruned(path: str, zeros: Mapping[str, Tensor], masks: Sequence[Tensor]) -> bool:
    """Whether a checkpoint has the final masks: while pruning, zeros may be as many elsewhere, or these and more.

    A file with a state of pruning has the masks themselves. Of one without, as ``save_weights_only`` makes, zeros tell.

    Args:
        path: of the checkpoint.
        zeros: where the weights are 0 in the end, by parameter name.
        masks: that are final, packed.
    """
    if not Path(path).is_file():  # a folder, of a sharded strategy
        return False
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):  # the user's own objects are in it, or it is no archive
        return False
    if (ours := find_pruning_state(checkpoint)) is not None:
        auxiliary = ours["pruner"]["auxiliary"]
        return bool(auxiliary and auxiliary["frozen"]) and _equal(auxiliary["masks"], masks)
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return zeros.keys() <= state.keys() and _equal([state[name] == 0 for name in zeros], list(zeros.values()))


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))
