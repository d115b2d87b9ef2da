"""A table of the layers for a ``CSVLogger``."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_autoprune.reporting.layer_table import LayerSummary

__all__ = ["_write_table"]


def _write_table(folder: str, rows: Sequence[LayerSummary]) -> None:
    files = get_filesystem(folder)  # it may be a remote one
    files.makedirs(folder, exist_ok=True)
    with files.open(os.path.join(folder, "autoprune_layers.csv"), "w", newline="") as file:
        writer = csv.DictWriter(
            file, ["name", "shape", "weights", "kept", "sparsity", "flops", "flops_kept", "revived"]
        )
        writer.writeheader()
        for row in rows:
            writer.writerow({**row.as_dict(), "shape": "x".join(map(str, row.shape))})
