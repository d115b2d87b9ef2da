"""``export_program``: the shrunk model as a file that ``torch.export.load`` runs without the model's code."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.export_case import ExportCase
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.example_inputs import as_arguments, tensors_in

__all__ = ["export_program"]


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    shrunk: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Writes a model as a program of ``torch.export`` for any number of rows, without its dead channels.

    ``torch.export.load(path).module()`` gives a module that runs wherever torch does; the classes of the model are not
    needed. The file is read back, and its outputs on the example and on inputs like it are those of the model.

    Args:
        model: a module or LightningModule; it is left as it was.
        path: of the file, which ends in ``.pt2`` by custom; it is replaced whole or not at all.
        example_input: what its ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments, with
            a first dimension of rows.
        shrunk: whether :func:`shrink` comes first; zeros are stored like other values either way.
        tolerance: as of :func:`shrink`.

    Raises:
        AutoPruneError: if the model can't be shrunk or exported, or its outputs are others, for any number of rows on
            which it runs.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export_program(model, f"{directory}/pruned.pt2", torch.zeros(1, 4))
        ...     torch.export.load(f"{directory}/pruned.pt2").module()(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    exported = ExportCase(model, example_input, shrunk)
    with atomic_write(path) as temporary:
        try:
            program = torch.export.export(
                exported.small, exported.args, exported.kwargs, dynamic_shapes=exported.dynamic_shapes
            )
            with temporary.open("wb") as file:
                torch.export.save(program, file)
            with temporary.open("rb") as file:
                run = partial(_run, torch.export.load(file).module())
            runs = [run(inputs) for inputs, _ in exported.tried]
        except Exception as error:
            raise AutoPruneError(f"{exported.name} can't be exported by torch.export: {error}") from error
        exported.check(runs, run, "as a program", tolerance)


@torch.no_grad()
def _run(program: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = as_arguments(inputs)
    return list(tensors_in(program(*args, **kwargs)))
