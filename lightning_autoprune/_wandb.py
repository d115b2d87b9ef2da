"""The only place that imports wandb: the pruned checkpoint as an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

__all__ = ["log_artifact"]


def log_artifact(trainer: Trainer, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Logs the best checkpoint that is pruned as an artifact of type ``model``, alias ``pruned``.

    The best is that of a ``ModelCheckpoint`` with a ``monitor``, among its files that have all the zeros of the end of
    the run; else the last such file; else the model as it is now. A failure is a warning: the training is over, and its
    results are not to be lost for it.

    Args:
        trainer: the trainer, when fitting has ended, on its first process.
        weights: the pruned weights, by layer name.
        metadata: figures to store with it; the monitored one is added.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    try:
        import wandb

        with tempfile.TemporaryDirectory() as directory:
            path, monitored = _best(trainer, weights)
            if path is None:
                path = Path(directory) / "pruned.ckpt"
                trainer.save_checkpoint(path, weights_only=True)
            for logger in loggers:
                run = logger.experiment
                artifact = wandb.Artifact(f"pruned-{run.id}", type="model", metadata={**metadata, **monitored})
                artifact.add_file(str(path), name="model.ckpt")
                run.log_artifact(artifact, aliases=["pruned"])
                if not run.offline:
                    artifact.wait()  # else a failed upload goes unnoticed
    except Exception as error:
        rank_zero_warn(f"The pruned checkpoint was not logged to W&B: {type(error).__name__}: {error}")


def _best(trainer: Trainer, weights: Mapping[str, Tensor]) -> tuple[Path | None, dict[str, float]]:
    """The file, and the figure that it was chosen by."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    zeros = {names[id(weight)]: int((weight == 0).sum()) for weight in weights.values()}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoints = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for checkpoint in checkpoints:
        if checkpoint.monitor:
            sign = 1 if checkpoint.mode == "min" else -1
            for path, value in sorted(checkpoint.best_k_models.items(), key=lambda item: sign * float(item[1])):
                if _is_pruned(path, zeros):
                    return Path(path), {checkpoint.monitor: float(value)}
    for checkpoint in checkpoints:
        for path in (checkpoint.last_model_path, checkpoint.best_model_path):
            if path and _is_pruned(path, zeros):
                return Path(path), {}
    return None, {}


def _is_pruned(path: str, zeros: Mapping[str, int]) -> bool:
    """Whether a checkpoint has as many zeros in each weight as there are in the end."""
    if not Path(path).is_file():  # a folder, of a sharded strategy
        return False
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)  # this run has just written it
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return all(name in state and int((state[name] == 0).sum()) >= count for name, count in zeros.items())
