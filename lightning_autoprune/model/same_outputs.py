"""Whether two models compute the same outputs, up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["difference", "disagreement", "spreads"]


def spreads(runs: list[list[Tensor]]) -> list[Tensor]:
    """How much each entry of the outputs of several runs varies over their rows; infinite where no entry does."""
    found = []
    for tensors in zip(*runs, strict=False):
        rows = [_real(tensor.cpu()).double() for tensor in tensors]
        rows = [some if some.dim() else some[None] for some in rows]
        spread = torch.cat([some for some in rows if some.shape[1:] == rows[0].shape[1:]]).std(0, correction=0)
        varied = spread[spread > 0]
        found.append(spread.nan_to_num() + (varied.median() if len(varied) else torch.inf))
    return found


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def difference(found: Iterable[Tensor], aims: Iterable[Tensor], spread: Iterable[Tensor], tolerance: float) -> str:
    """In what outputs differ from what they should be; empty if they do not.

    Args:
        found: tensors.
        aims: what they should be.
        spread: what :func:`spreads` says of them. On an offset, entries may be alike though what varies in them is not:
            they differ by at most a hundredth of the tolerance, or a hundred times the tolerance of what varies.
        tolerance: largest difference of an entry, relative to it and to the median of all entries that are not 0; at
            least 8 times the resolution of the dtype.
    """
    for output, aim, varies in zip(found, aims, spread, strict=True):
        if output.shape != aim.shape:
            return f"an output has the shape {tuple(output.shape)}, not {tuple(aim.shape)}"
        if not (aim.is_floating_point() or aim.is_complex()):
            if (changed := float((output.cpu() != aim.cpu()).double().mean())) > 1e-3:  # a tie may go the other way
                return f"{changed:.0%} of an output of the type {aim.dtype} change"
            continue
        x, y = _real(output.cpu()), _real(aim.cpu())
        finite = y.isfinite()
        if not torch.equal(x.isfinite(), finite) or not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
            return "an output has entries that are not finite where it should not, or the other way round"
        sizes = y[finite].double().abs()
        scale = float(sizes[sizes > 0].median()) if sizes.any() else 1e-6
        change = (x[finite].double() - y[finite].double()).abs()
        least = 8 * torch.finfo(y.dtype).eps
        if (change > max(tolerance, least) * (sizes + scale)).any():
            return f"an output changes by {float(change.max()):.2g}, where its entries are about {scale:.2g}"
        far = change > max(tolerance / 100, least) * (sizes + scale)
        if varies.shape != y.shape[1:]:  # of an output whose other dimensions hang on the number of rows
            varies = varies.median()
        if (far & (change > 100 * tolerance * varies.expand(y.shape)[finite])).any():
            return (
                f"an output changes by {float(change.max()):.2g}, where its entries vary by {float(varies.min()):.2g}"
            )
    return ""


def disagreement(run: Callable[[Any], list[Tensor]], tried: list[tuple[Any, list[Tensor]]], tolerance: float) -> str:
    """In what the outputs of some inputs are others, or that there are none; empty if they are the same.

    Args:
        run: gives the outputs of inputs.
        tried: inputs, each with what the outputs should be.
        tolerance: as of :func:`difference`.
    """
    spread = spreads([aims for _, aims in tried])
    for inputs, aims in tried:
        try:
            found = run(inputs)
        except Exception as error:  # of any kind: a forward may refuse sizes in its own way
            return f"it does not run ({error})"
        if problem := difference(found, aims, spread, tolerance):
            return problem
    return ""
