"""Checks whether outputs are as expected, up to rounding, and describes the first one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.model.forward import RecordedRun

__all__ = ["describe_mismatch", "find_mismatch", "measure_spread"]

_CHANGED_INTEGERS = 1e-3  # fraction that may change: rounding may decide a tie of argmax the other way

_ROUNDING = 8  # smallest tolerance, in multiples of the dtype's resolution


def measure_spread(runs: list[list[Tensor]]) -> list[Tensor]:
    """Return how much each entry of a model's outputs varies over the samples of several runs.

    Args:
        runs: the outputs of each run, with samples along the first dimension. Runs in which an output has another shape
            per sample than in the first run are left out.

    Returns:
        For each output a float64 tensor of the shape of one sample: the standard deviation of each entry, plus the
        median of those that are not 0. Infinite if no entry varies.
    """
    spreads = []
    for outputs in zip(*runs, strict=False):
        samples = [_as_real(output.cpu()).double() for output in outputs]
        samples = [batch if batch.dim() else batch[None] for batch in samples]
        same_shape = [batch for batch in samples if batch.shape[1:] == samples[0].shape[1:]]
        deviation = torch.cat(same_shape).std(0, correction=0)
        positive = deviation[deviation > 0]
        spreads.append(deviation.nan_to_num() + (positive.median() if len(positive) else torch.inf))
    return spreads


def find_mismatch(run: Callable[[Any], list[Tensor]], expected_runs: list[RecordedRun], tolerance: float) -> str:
    """Run the inputs and describe the first output that is not as expected; "" if all match.

    Args:
        run: returns the outputs for inputs.
        expected_runs: inputs, each with the expected outputs.
        tolerance: as in :func:`describe_mismatch`.
    """
    spread = measure_spread([expected for _, expected in expected_runs])
    for inputs, expected in expected_runs:
        try:
            outputs = run(inputs)
        except Exception as error:  # of any kind: a forward may refuse sizes in its own way
            return f"it does not run ({error})"
        if mismatch := describe_mismatch(outputs, expected, spread, tolerance):
            return mismatch
    return ""


def describe_mismatch(
    outputs: Iterable[Tensor], expected: Iterable[Tensor], spread: Iterable[Tensor], tolerance: float
) -> str:
    """Describe the first output that differs from what is expected; "" if all match.

    An entry may differ by ``tolerance`` times the sum of its size and the median size of the entries that are not 0.
    If outputs have a large offset, this would hide differences in the part that varies. So a difference above a
    hundredth of that must also be at most 100 ``tolerance`` times the spread of the entry.

    Args:
        outputs: tensors to check.
        expected: the tensors that they should equal.
        spread: the result of :func:`measure_spread` for the expected outputs.
        tolerance: largest relative difference; at least 8 times the resolution of the dtype is allowed.
    """
    for output, aim, output_spread in zip(outputs, expected, spread, strict=True):
        if output.shape != aim.shape:
            return f"an output has the shape {tuple(output.shape)}, not {tuple(aim.shape)}"
        if aim.is_floating_point() or aim.is_complex():
            mismatch = _describe_float_mismatch(output.cpu(), aim.cpu(), output_spread, tolerance)
        else:
            mismatch = _describe_integer_mismatch(output.cpu(), aim.cpu())
        if mismatch:
            return mismatch
    return ""


def _describe_integer_mismatch(output: Tensor, aim: Tensor) -> str:
    changed = float((output != aim).double().mean())
    return f"{changed:.0%} of an output of the type {aim.dtype} change" if changed > _CHANGED_INTEGERS else ""


def _describe_float_mismatch(output: Tensor, aim: Tensor, spread: Tensor, tolerance: float) -> str:
    x, y = _as_real(output), _as_real(aim)
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return "an output has entries that are not finite where it should not, or the other way round"
    change = (x[finite].double() - y[finite].double()).abs()
    sizes = y[finite].double().abs()
    typical_size = float(sizes[sizes > 0].median()) if sizes.any() else 1e-6
    resolution = _ROUNDING * torch.finfo(y.dtype).eps
    if (change > max(tolerance, resolution) * (sizes + typical_size)).any():
        return f"an output changes by {float(change.max()):.2g}, where its entries are about {typical_size:.2g}"
    noticeable = change > max(tolerance / 100, resolution) * (sizes + typical_size)
    if spread.shape != y.shape[1:]:  # the size of a sample depends on the batch size
        spread = spread.median()
    if (noticeable & (change > 100 * tolerance * spread.expand(y.shape)[finite])).any():
        return f"an output changes by {float(change.max()):.2g}, where its entries vary by {float(spread.min()):.2g}"
    return ""


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
