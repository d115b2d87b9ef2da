"""``export_onnx``: the shrunk model as an ONNX file, checked in onnxruntime."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.export_case import ExportCase
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.example_inputs import as_arguments, tensors_in

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Any,
    *,
    shrunk: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Writes a model as an ONNX file for any number of rows, without its dead channels.

    The file is made by torch's own exporter, and run in onnxruntime on the example and on inputs like it, one row and
    several: its outputs are those of the model.

    Args:
        model: a module or LightningModule; it is left as it was.
        path: of the file; it is replaced whole or not at all.
        example_input: what its ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments, with
            a first dimension of rows.
        shrunk: whether :func:`shrink` comes first; zeros are stored like other values either way.
        tolerance: as of :func:`shrink`.

    Raises:
        AutoPruneError: if onnx, onnxscript or onnxruntime is not installed, the model can't be shrunk or exported, or
            its outputs in onnxruntime are others, for any number of rows on which it runs.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     export_onnx(model, f"{directory}/pruned.onnx", torch.zeros(1, 4))
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise AutoPruneError(f"Export to ONNX needs {error.name}: pip install 'lightning-autoprune[onnx]'.") from error
    exported = ExportCase(model, example_input, shrunk)
    with atomic_write(path) as temporary:
        _write(exported, temporary)
        try:
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]

            def run(inputs: Any) -> list[Tensor]:
                found = session.run(None, dict(zip(names, _arrays(inputs), strict=True)))
                return [torch.from_numpy(output) for output in found]

            runs = [run(inputs) for inputs, _ in exported.tried]
        except Exception as error:
            raise AutoPruneError(
                f"{exported.name} can't be run in onnxruntime: {type(error).__name__}: {error}"
            ) from error
        exported.check(runs, run, "in onnxruntime", tolerance)


def _arrays(inputs: Any) -> list[Any]:
    return [tensor.detach().cpu().numpy() for tensor in tensors_in(as_arguments(inputs))]


def _write(exported: ExportCase, path: Path) -> None:
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it warns of torchvision, which is not needed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                exported.small,
                exported.args,
                path,
                kwargs=exported.kwargs,
                dynamo=True,
                dynamic_shapes=exported.dynamic_shapes,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise AutoPruneError(f"{exported.name} can't be exported to ONNX: {error}") from error
    finally:
        log.setLevel(level)
