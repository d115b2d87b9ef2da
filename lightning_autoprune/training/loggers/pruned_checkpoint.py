"""Finds the best of the saved checkpoints that have the final masks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.checkpoint_reader import find_pruning_state
from lightning_autoprune.tensors.bitmasks import pack
from lightning_autoprune.training.lightning_package import ModelCheckpoint, Trainer, both

__all__ = ["find_pruned_checkpoint", "has_final_masks"]


def find_pruned_checkpoint(trainer: Trainer, pruner: Pruner) -> tuple[Path | None, dict[str, float]]:
    """Find the best checkpoint with the final masks, or the last one if no ``ModelCheckpoint`` monitors a metric.

    Args:
        trainer: the trainer, when fitting has ended.
        pruner: the pruner, whose masks are final.

    Returns:
        The file, None if there is none; and the value of the monitored metric by name, empty for the last file.
    """
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    zeros = {names[id(weight)]: (weight == 0).cpu() for weight in pruner.weights.values()}
    masks = [pack(mask) for mask in pruner.each_mask()]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = [callback for callback in callbacks if isinstance(callback, both(ModelCheckpoint))]
    for checkpoint in checkpoints:
        if checkpoint.monitor:
            sign = 1 if checkpoint.mode == "min" else -1
            for path, value in sorted(checkpoint.best_k_models.items(), key=lambda item: sign * float(item[1])):
                if has_final_masks(path, zeros, masks):
                    return Path(path), {checkpoint.monitor: float(value)}
    for checkpoint in checkpoints:
        for path in (checkpoint.last_model_path, checkpoint.best_model_path):
            if path and has_final_masks(path, zeros, masks):
                return Path(path), {}
    return None, {}


def has_final_masks(path: str, zeros: Mapping[str, Tensor], masks: Sequence[Tensor]) -> bool:
    """Return True if a checkpoint was saved with the final masks.

    Counting zeros would not do: while masks change, there may be as many zeros elsewhere, or the final ones and more.
    A file with the state of pruning holds the masks themselves. A file without it (``save_weights_only``) has the final
    masks if its weights are 0 at exactly the same places.

    Args:
        path: path of the checkpoint.
        zeros: True where a weight is 0 now, by parameter name.
        masks: the final masks, packed.
    """
    if not Path(path).is_file():  # a sharded strategy saves folders
        return False
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):  # it holds the user's own objects, or is not an archive
        return False
    if (ours := find_pruning_state(checkpoint)) is not None:
        auxiliary = ours["pruner"]["auxiliary"]
        return bool(auxiliary and auxiliary["frozen"]) and _all_equal(auxiliary["masks"], masks)
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return zeros.keys() <= state.keys() and _all_equal([state[name] == 0 for name in zeros], list(zeros.values()))


def _all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
