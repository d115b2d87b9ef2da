"""Prepares a model for export, and checks that the file computes the model's outputs. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.deploy.shrink import shrink
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.example_inputs import (
    dynamic_batch_shapes,
    repeat_single_sample,
    run_batch_sizes,
    run_variations,
)
from lightning_autoprune.model.forward import ExampleInput, RecordedRun, as_arguments, copy_model, run_model
from lightning_autoprune.model.same_outputs import describe_mismatch, find_mismatch, measure_spread

__all__ = ["ExportCase"]


class ExportCase:
    """A model to export for any batch size, and the outputs that its file must compute.

    Args:
        model: a module; it is left as it was.
        example_input: an input on which the model runs.
        shrunk: whether the model is shrunk first.

    Attributes:
        name: class name of the model.
        module: the module to export, in evaluation mode.
        args: positional arguments to export it with.
        kwargs: keyword arguments to export it with.
        dynamic_shapes: as ``torch.export`` takes them.
        expected_runs: inputs, each with the outputs of the model.
    """

    def __init__(self, model: nn.Module, example_input: ExampleInput, shrunk: bool) -> None:
        self.name, self._model = type(model).__name__, model
        self._example = repeat_single_sample(model, example_input)
        self.module = (shrink(model, self._example) if shrunk else copy_model(model)).eval()
        self.args, self.kwargs = as_arguments(self._example)
        self.dynamic_shapes = dynamic_batch_shapes(self.args, self.kwargs)
        with torch.no_grad():
            example_run = RecordedRun(example_input, run_model(model, example_input))
            self.expected_runs = [example_run, *run_variations(model, self._example)]

    def check_outputs(
        self, outputs: list[list[Tensor]], run: Callable[[Any], list[Tensor]], where: str, tolerance: float
    ) -> None:
        """Raise an error unless the file computes the model's outputs, for any batch size on which the model runs.

        Args:
            outputs: outputs of the file for the inputs in ``expected_runs``.
            run: returns the outputs of the file for other inputs.
            where: in what the file runs, for the message.
            tolerance: as in :func:`shrink`.
        """
        spread = measure_spread([expected for _, expected in self.expected_runs])
        for actual, (_, expected) in zip(outputs, self.expected_runs, strict=True):
            if mismatch := describe_mismatch(actual, expected, spread, tolerance):
                raise AutoPruneError(
                    f"{self.name} gives other outputs {where}: {mismatch}. Raise `tolerance` if that is close enough."
                )
        if mismatch := find_mismatch(run, run_batch_sizes(self._model, self._example), tolerance):
            raise AutoPruneError(
                f"{self.name} gives the right outputs {where} only for the batch size of the example: {mismatch}. Its"
                " `forward` must not fix the batch size: use `x.shape[0]`, without `int`, `len` or a loop over samples."
            )
