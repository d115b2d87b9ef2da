"""``export_onnx``: the shrunk model as an ONNX file, checked in onnxruntime."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.export_case import ExportCase
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.forward import ExampleInput, as_arguments, tensors_in

__all__ = ["export_onnx"]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: ExampleInput,
    *,
    shrunk: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Write a model as an ONNX file for any batch size, without its dead channels.

    The file is made by torch's own exporter. It is then run in onnxruntime on the example and on inputs like it, with
    one and with several samples, and its outputs must be those of the model.

    Args:
        model: a module or LightningModule; it is left as it was.
        path: path of the file; it is replaced whole or not at all.
        example_input: an input on which the model runs, with samples along the first dimension.
        shrunk: whether to :func:`shrink` the model first; zeros that remain are stored like other values.
        tolerance: as in :func:`shrink`.

    Raises:
        AutoPruneError: if onnx, onnxscript or onnxruntime is not installed, if the model can't be shrunk or exported,
            or if the outputs in onnxruntime differ from the model's for any batch size on which the model runs.

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
    case = ExportCase(model, example_input, shrunk)
    with atomic_write(path) as temporary:
        _write(case, temporary)
        try:
            session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
            run = partial(_run, session)
            outputs = [run(inputs) for inputs, _ in case.expected_runs]
        except Exception as error:
            raise AutoPruneError(f"{case.name} can't be run in onnxruntime: {type(error).__name__}: {error}") from error
        case.check_outputs(outputs, run, "in onnxruntime", tolerance)


def _write(case: ExportCase, path: Path) -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                case.module,
                case.args,
                path,
                kwargs=case.kwargs,
                dynamo=True,
                dynamic_shapes=case.dynamic_shapes,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        raise AutoPruneError(f"{case.name} can't be exported to ONNX: {error}") from error
    finally:
        logger.setLevel(level)


def _run(session: Any, inputs: Any) -> list[Tensor]:
    names = [entry.name for entry in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_in(as_arguments(inputs))]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    return [torch.from_numpy(output) for output in outputs]
