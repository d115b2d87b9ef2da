"""The only place that imports wandb: figures of the run, and the pruned checkpoint as an artifact."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_autoprune.history import History
from lightning_autoprune.summary import LayerSummary, total

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_artifact", "log_figures"]


def log_figures(
    logger: WandbLogger,
    step: int,
    rows: Sequence[LayerSummary],
    history: History,
    heatmap: Figure | None,
    best: Mapping[str, float] | None,
) -> None:
    """Logs the figures of a run as one row, and sets its summary when fitting has ended.

    Args:
        logger: what to log to.
        step: number of training steps that are over.
        rows: the layers.
        history: the run so far.
        heatmap: the picture of it; None where it can't be drawn.
        best: best values of the monitored metric, by name, when fitting has ended; None before.
    """
    import wandb

    run = logger.experiment
    figures: dict[str, Any] = {"autoprune/layers": _table(rows)}
    if heatmap is not None:
        figures["autoprune/sparsity_map"] = wandb.Image(heatmap)
    for name, (counts, edges) in history.histograms.items():
        figures[f"autoprune/m/{name}"] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
    if history.metric and history.points:
        points = wandb.Table(["sparsity", history.metric], [[sparsity, value] for _, sparsity, value in history.points])
        title = f"{history.metric} against sparsity"
        figures["autoprune/path"] = wandb.plot.line(points, "sparsity", history.metric, title=title)
    run.log({**figures, "trainer/global_step": step})
    if best is not None:
        whole = total(rows)
        run.summary["autoprune/final_sparsity"] = whole.sparsity
        run.summary["autoprune/final_compression"] = whole.weights / max(whole.kept, 1)
        for name, value in best.items():
            run.summary[f"autoprune/{name}"] = value


def _table(rows: Sequence[LayerSummary]) -> Any:
    import wandb

    table = wandb.Table(["layer", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"])
    for row in rows:
        shape = "×".join(map(str, row.shape))
        table.add_data(row.name, shape, row.weights, row.kept, row.sparsity, row.flops, row.flops_kept, row.revived)
    return table


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
    zeros = {names[id(weight)]: (weight == 0).cpu() for weight in weights.values()}
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


def _is_pruned(path: str, zeros: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has the zeros that there are in the end: while pruning there may be as many elsewhere."""
    if not Path(path).is_file():  # a folder, of a sharded strategy
        return False
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError):  # the user's own objects are in it, or it is no archive
        return False
    state: Mapping[str, Tensor] = checkpoint["state_dict"]
    return all(name in state and not state[name][places].any() for name, places in zeros.items())
