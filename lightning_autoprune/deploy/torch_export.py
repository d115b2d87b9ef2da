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
from lightning_autoprune.model.forward import ExampleInput, as_arguments, tensors_in

__all__ = ["export_program"]


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: ExampleInput,
    *,
    shrunk: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Write a model as a program of ``torch.export`` for any batch size, without its dead channels.

    ``torch.export.load(path).module()`` returns a module that runs wherever torch does, without the model's classes.
    The file is read back, and its outputs on the example and on inputs like it must be those of the model.

    Args:
        model: a module or LightningModule; it is left as it was.
        path: path of the file, by convention with the suffix ``.pt2``; it is replaced whole or not at all.
        example_input: an input on which the model runs, with samples along the first dimension.
        shrunk: whether to :func:`shrink` the model first; zeros that remain are stored like other values.
        tolerance: as in :func:`shrink`.

    Raises:
        AutoPruneError: if the model can't be shrunk or exported, or if the outputs of the program differ from the
            model's for any batch size on which the model runs.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export_program(model, f"{directory}/pruned.pt2", torch.zeros(1, 4))
        ...     torch.export.load(f"{directory}/pruned.pt2").module()(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    case = ExportCase(model, example_input, shrunk)
    with atomic_write(path) as temporary:
        try:
            program = torch.export.export(case.module, case.args, case.kwargs, dynamic_shapes=case.dynamic_shapes)
            with temporary.open("wb") as file:
                torch.export.save(program, file)
            with temporary.open("rb") as file:
                run = partial(_run, torch.export.load(file).module())
            outputs = [run(inputs) for inputs, _ in case.expected_runs]
        except Exception as error:
            raise AutoPruneError(f"{case.name} can't be exported by torch.export: {error}") from error
        case.check_outputs(outputs, run, "as a program", tolerance)


@torch.no_grad()
def _run(program: nn.Module, inputs: Any) -> list[torch.Tensor]:
    args, kwargs = as_arguments(inputs)
    return list(tensors_in(program(*args, **kwargs)))
