"""The table of the layers as a file, for a ``CSVLogger``."""

from __future__ import annotations

import csv
import os

from typing_extensions import override

from lightning_autoprune.training.lightning_package import CSVLogger, get_filesystem
from lightning_autoprune.training.loggers.figure_writer import FigureWriter, RunFigures

__all__ = ["CSVFigures"]

_COLUMNS = ("name", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived")


class CSVFigures(FigureWriter[CSVLogger]):
    """Writes the table of the layers to ``autoprune_layers.csv``, beside the logger's ``metrics.csv``."""

    @override
    def log(self, logger: CSVLogger, figures: RunFigures) -> None:
        folder = logger.log_dir
        filesystem = get_filesystem(folder)  # the folder may be remote
        filesystem.makedirs(folder, exist_ok=True)
        with filesystem.open(os.path.join(folder, "autoprune_layers.csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            for layer in figures.layers:
                writer.writerow({**layer.as_dict(), "shape": "x".join(map(str, layer.shape))})
