"""Figures and the pruned checkpoint for W&B. The only module that imports wandb, and only once a run is logged."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.reporting.layer_table import LayerSummary, sum_layers
from lightning_autoprune.training.lightning_internals import dump_weights, logger_key
from lightning_autoprune.training.lightning_package import Trainer, WandbLogger, both
from lightning_autoprune.training.loggers.figure_writer import LAYERS, PATH, SPARSITY_MAP, FigureWriter, RunFigures
from lightning_autoprune.training.loggers.pruned_checkpoint import find_pruned_checkpoint

__all__ = ["WandbFigures", "log_artifact"]


class WandbFigures(FigureWriter[WandbLogger]):
    """Logs all figures as one row of the run, and sets the run's summary when fitting has ended."""

    @override
    def log(self, logger: WandbLogger, figures: RunFigures) -> None:
        import wandb

        sparsity_map, root = figures.draw_sparsity_map(), logger_key(logger, "autoprune")
        run = logger.experiment
        row: dict[str, Any] = {f"{root}/{LAYERS}": _layer_table(figures.layers)}
        if sparsity_map is not None:
            row[f"{root}/{SPARSITY_MAP}"] = wandb.Image(sparsity_map)
        for name, (counts, edges) in figures.histograms.items():
            row[f"{root}/{name}"] = wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))
        metric = figures.history.metric
        if metric and figures.path:  # a native chart of W&B, which needs no matplotlib
            points = wandb.Table(["sparsity", metric], [list(point) for point in figures.path])
            row[f"{root}/{PATH}"] = wandb.plot.line(points, "sparsity", metric, title=f"{metric} against sparsity")
        run.log({**row, "trainer/global_step": figures.step})
        if figures.best is not None:
            whole = sum_layers(figures.layers)
            run.summary[f"{root}/final_sparsity"] = whole.sparsity
            run.summary[f"{root}/final_compression"] = whole.weights / max(whole.kept, 1)
            for name, value in figures.best.items():
                run.summary[f"{root}/{name}"] = value


def _layer_table(layers: Sequence[LayerSummary]) -> Any:
    import wandb

    table = wandb.Table(["layer", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"])
    for row in layers:
        shape = "×".join(map(str, row.shape))
        table.add_data(row.name, shape, row.weights, row.kept, row.sparsity, row.flops, row.flops_kept, row.revived)
    return table


def log_artifact(trainer: Trainer, pruner: Pruner, metadata: Mapping[str, Any]) -> None:
    """Log the best pruned checkpoint to each ``WandbLogger``, as an artifact of type ``model`` with alias ``pruned``.

    Only files with the final masks count. The best is taken from a ``ModelCheckpoint`` that has a ``monitor``; if there
    is none, it is the last file of any ``ModelCheckpoint``; failing that, the model as it is now. An error becomes a
    warning: the training is over, and its results must not be lost.

    Args:
        trainer: the trainer, when fitting has ended, on all processes.
        pruner: the pruner, whose masks are final.
        metadata: values to store with the artifact; the monitored metric is added.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, both(WandbLogger))]
    if not loggers:
        return
    try:
        # on all ranks: the module's own `on_save_checkpoint` may wait for the others. Nothing below may wait for them.
        weights = dump_weights(trainer)
        if not trainer.is_global_zero:
            return
        import wandb

        with tempfile.TemporaryDirectory() as directory:
            path, monitored = find_pruned_checkpoint(trainer, pruner)
            if path is None:
                path = Path(directory) / "pruned.ckpt"
                torch.save(weights, path)
            for logger in loggers:
                run = logger.experiment
                artifact = wandb.Artifact(f"pruned-{run.id}", type="model", metadata={**metadata, **monitored})
                artifact.add_file(str(path), name="model.ckpt")
                run.log_artifact(artifact, aliases=["pruned"])
                if not run.offline:
                    artifact.wait()  # else a failed upload goes unnoticed
    except Exception as error:
        rank_zero_warn(f"The pruned checkpoint was not logged to W&B: {type(error).__name__}: {error}")
