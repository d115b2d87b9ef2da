"""What the exports share: the model that is written, and the check that a file gives its outputs. Torch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.deploy.shrink import shrink
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.example_inputs import any_rows, as_arguments, by_rows, copied, outputs, probes, two_rows
from lightning_autoprune.model.same_outputs import difference, disagreement, spreads

__all__ = ["ExportCase"]


class ExportCase:
    """A model that is to be written for any number of rows, and the outputs that its file must give.

    Args:
        model: a module; it is left as it was.
        example_input: what its ``forward`` takes.
        shrunk: whether :func:`shrink` comes first.

    Attributes:
        name: of the model's class.
        small: the module to write, in evaluation mode.
        args: positional arguments to write it with.
        kwargs: keyword arguments.
        dynamic_shapes: as ``torch.export`` takes them.
        tried: inputs, each with the outputs of the model.
    """

    def __init__(self, model: nn.Module, example_input: Any, shrunk: bool) -> None:
        self.name, self._model = type(model).__name__, model
        self._example = two_rows(model, example_input)  # one row would be taken for a constant
        self.small = (shrink(model, self._example) if shrunk else copied(model)).eval()
        self.args, self.kwargs = as_arguments(self._example)
        self.dynamic_shapes = any_rows(self.args, self.kwargs)
        with torch.no_grad():
            self.tried = [(example_input, outputs(model, example_input)), *probes(model, self._example)]

    def check(self, runs: list[list[Tensor]], run: Callable[[Any], list[Tensor]], where: str, tolerance: float) -> None:
        """Raises unless the outputs are those of the model, for any number of rows on which it runs.

        Args:
            runs: outputs of the file for the inputs ``tried``.
            run: gives them for others.
            where: it runs, for the message.
            tolerance: as of :func:`shrink`.
        """
        spread = spreads([aims for _, aims in self.tried])
        for found, (_, aims) in zip(runs, self.tried, strict=True):
            if problem := difference(found, aims, spread, tolerance):
                raise AutoPruneError(
                    f"{self.name} gives other outputs {where}: {problem}. Raise `tolerance` if that is close enough."
                )
        if problem := disagreement(run, by_rows(self._model, self._example), tolerance):
            raise AutoPruneError(
                f"{self.name} is right {where} for the number of rows of the example alone: {problem}. Leave that"
                " number out of its `forward`: use `x.shape[0]`, without `int`, `len` or a loop over rows."
            )
