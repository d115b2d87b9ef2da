"""The only place that imports wandb: figures of the run, and the pruned checkpoint as an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.layer_table import LayerSummary, sum_layers
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.training.loggers.pruned_checkpoint import _best

__all__ = ["log_artifact", "log_figures"]


def log_figures(
    logger: WandbLogger,
    root: str,
    step: int,
    rows: Sequence[LayerSummary],
    history: RunHistory,
    heatmap: Figure | None,
    best: Mapping[str, float] | None,
) -> None:
    """Logs the figures of a run as one row, and sets its summary when fitting has ended.

    Args:
        logger: what to log to.
        root: what all names begin with, before a slash.
        step: number of training steps that are over.
        rows: the layers.
        history: the run so far.
        heatmap: the picture of it; None where it can't be drawn.
        best: best values of the monitored metric, by name, when fitting has ended; None before.
    """
    import wandb

    run = logger.experiment
    figures: dict[str, Any] = {f"{root}/layers": _table(rows)}
    if heatmap is not None:
        figures[f"{root}/sparsity_map"] = wandb.Image(heatmap)
    for name, (counts, edges) in history.histograms.items():
        figures[f"{root}/m/{name}"] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
    if history.metric and history.points:
        points = wandb.Table(["sparsity", history.metric], [[sparsity, value] for _, sparsity, value in history.points])
        title = f"{history.metric} against sparsity"
        figures[f"{root}/path"] = wandb.plot.line(points, "sparsity", history.metric, title=title)
    run.log({**figures, "trainer/global_step": step})
    if best is not None:
        whole = sum_layers(rows)
        run.summary[f"{root}/final_sparsity"] = whole.sparsity
        run.summary[f"{root}/final_compression"] = whole.weights / max(whole.kept, 1)
        for name, value in best.items():
            run.summary[f"{root}/{name}"] = value


def _table(rows: Sequence[LayerSummary]) -> Any:
    import wandb

    table = wandb.Table(["layer", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"])
    for row in rows:
        shape = "×".join(map(str, row.shape))
        table.add_data(row.name, shape, row.weights, row.kept, row.sparsity, row.flops, row.flops_kept, row.revived)
    return table


def log_artifact(trainer: Trainer, pruner: Pruner, metadata: Mapping[str, Any]) -> None:
    """Logs the best checkpoint that is pruned as an artifact of type ``model``, alias ``pruned``.

    The best is that of a ``ModelCheckpoint`` with a ``monitor``, among its files that have the final masks; else the
    last such file; else the model as it is now. A failure is a warning: the training is over, and its results are not
    to be lost for it.

    Args:
        trainer: the trainer, when fitting has ended, on all processes.
        pruner: whose masks are final.
        metadata: figures to store with it; the monitored one is added.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers:
        return
    try:
        # on all ranks, as the module's own `on_save_checkpoint` may wait for the others; nothing else here may
        now = trainer._checkpoint_connector.dump_checkpoint(weights_only=True)
        if not trainer.is_global_zero:
            return
        import wandb

        with tempfile.TemporaryDirectory() as directory:
            path, monitored = _best(trainer, pruner)
            if path is None:
                path = Path(directory) / "pruned.ckpt"
                torch.save(now, path)
            for logger in loggers:
                run = logger.experiment
                artifact = wandb.Artifact(f"pruned-{run.id}", type="model", metadata={**metadata, **monitored})
                artifact.add_file(str(path), name="model.ckpt")
                run.log_artifact(artifact, aliases=["pruned"])
                if not run.offline:
                    artifact.wait()  # else a failed upload goes unnoticed
    except Exception as error:
        rank_zero_warn(f"The pruned checkpoint was not logged to W&B: {type(error).__name__}: {error}")
