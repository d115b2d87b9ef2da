"""Make inputs like a given example: with other batch sizes, with other values, and with NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.model.forward import (
    ExampleInput,
    RecordedRun,
    as_arguments,
    map_values,
    run_model,
    tensors_in,
)

__all__ = [
    "dynamic_batch_shapes",
    "every_value_varies",
    "repeat_single_sample",
    "replace_floats_with_nan",
    "run_batch_sizes",
    "run_variations",
    "run_varied",
]


@torch.no_grad()
def _run_where_possible(model: nn.Module, candidates: Iterable[Any]) -> Iterator[RecordedRun]:
    """Run a model on candidate inputs, and skip those that it refuses."""
    for inputs in candidates:
        try:
            yield RecordedRun(inputs, run_model(model, inputs))
        except Exception:  # of any kind: an index out of range, or a forward with checks of its own
            continue


# Other batch sizes


def repeat_single_sample(model: nn.Module, example_input: ExampleInput) -> Any:
    """Repeat a one-sample example, since torch.export would treat a batch size of 1 as a constant.

    Longer examples are returned unchanged. Warns if the model can't run on two samples.
    """
    if _batch_size(example_input) != 1:
        return example_input
    for inputs, _ in _run_where_possible(model, [_resize_batch(example_input, 2)]):
        return inputs
    warnings.warn(
        f"{type(model).__name__} runs only on a batch of one sample, and so will the exported file.", stacklevel=4
    )
    return example_input


def run_batch_sizes(model: nn.Module, example_input: ExampleInput) -> list[RecordedRun]:
    """Run a model on the example with 1, 2, 3 and 2n + 1 samples, where it has n; skip batch sizes that it refuses."""
    sizes = (1, 2, 3, 2 * _batch_size(example_input) + 1)
    return list(_run_where_possible(model, (_resize_batch(example_input, size) for size in sizes)))


def dynamic_batch_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the ``dynamic_shapes`` of ``torch.export`` that leave the first dimension of all tensors free."""
    shapes = torch.utils._pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None, (args, kwargs)
    )
    return shapes[1] if kwargs else shapes[0]


def _batch_size(example_input: ExampleInput) -> int:
    """Return the length of the first tensor that has dimensions; 0 if there is none."""
    return next((len(tensor) for tensor in tensors_in(example_input) if tensor.dim()), 0)


def _resize_batch(example_input: ExampleInput, size: int) -> Any:
    """Cut or repeat the samples to a batch size, in all tensors that are as long as the first."""
    old_size = _batch_size(example_input)

    def resize(leaf: Any) -> Any:
        has_samples = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == old_size > 0
        return leaf[torch.arange(size, device=leaf.device) % old_size] if has_samples else leaf

    return map_values(resize, example_input)


# Other values


@torch.no_grad()
def run_variations(model: nn.Module, example_input: ExampleInput) -> list[RecordedRun]:
    """Run a model on the example, then on inputs of the same kind with other values; skip those that it refuses.

    In the variations floats are normal random numbers, booleans are random, and integers change places with those of
    other samples, so that each column keeps its range. In the first variation no boolean stays as it is, and no integer
    of a tensor with several values. The next two have zeros at random places, as padding would; other integers stay.
    """
    generator = torch.Generator().manual_seed(0)
    change_all = partial(_redraw, generator=generator, change_all=True)
    redraw = partial(_redraw, generator=generator)
    punch_holes = partial(_redraw_with_holes, generator=generator)
    changes: list[Callable[[Any], Any]] = [change_all, punch_holes, punch_holes, redraw, redraw, redraw]
    variations = (map_values(change, example_input) for change in changes)
    recorded = RecordedRun(example_input, run_model(model, example_input))
    return [recorded, *_run_where_possible(model, variations)]


@torch.no_grad()
def run_varied(model: nn.Module, example_input: ExampleInput, samples: int = 4) -> RecordedRun:
    """Run a model once, on other values than the example's and few samples, as far as it accepts both."""
    generator = torch.Generator().manual_seed(0)
    few = _resize_batch(example_input, samples) if _batch_size(example_input) > samples else example_input
    candidates = (map_values(partial(_redraw, generator=generator), example) for example in (few, example_input))
    for run in _run_where_possible(model, candidates):
        return run
    return RecordedRun(example_input, run_model(model, example_input))


def _redraw(value: Any, generator: torch.Generator, *, change_all: bool = False) -> Any:
    """Draw floats and booleans anew, and shuffle integers among the samples.

    With ``change_all`` no boolean and no integer stays as it is: booleans are flipped, and integers are replaced by
    others of the tensor.
    """
    if not isinstance(value, Tensor):
        return value
    if _is_float(value):
        scale = float(value.std()) if value.numel() > 1 and value.std() > 0 else 1.0
        return (scale * torch.randn(value.shape, generator=generator)).to(value)
    if value.dtype == torch.bool:
        drawn = (torch.rand(value.shape, generator=generator) < 0.5).to(value.device)
        return ~value if change_all else drawn
    if value.dim() and not change_all:  # each column is shuffled by itself, as columns may have ranges of their own
        order = torch.rand(value.shape, generator=generator).argsort(0)
        if not torch.equal(shuffled := value.gather(0, order.to(value.device)), value):
            return shuffled
    distinct, places = torch.unique(value, return_inverse=True)
    return distinct.roll(1)[places]


def _redraw_with_holes(value: Any, generator: torch.Generator) -> Any:
    """Redraw floats and booleans, and set two fifths of the places in floats and integers to zero."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return _redraw(value, generator)
    # all features of a place at once
    shape = (*value.shape[:-1], 1) if _is_float(value) and value.dim() > 1 else value.shape
    outside_holes = (torch.rand(shape, generator=generator) < 0.6).to(value.device)
    return _redraw(value, generator) * outside_holes if _is_float(value) else value * outside_holes


def every_value_varies(inputs: list[Any]) -> bool:
    """Return whether each value in the first inputs is a tensor that has other values in some of the other inputs.

    Integers and booleans must vary in each column. A number that is no tensor, or an object in which no tensors can be
    found, counts as a value that does not vary; None and strings are ignored.
    """
    first, *others = [torch.utils._pytree.tree_leaves(as_arguments(example)) for example in inputs]
    if not others or not any(isinstance(value, Tensor) for value in first):
        return False
    return all(_varies(value, [other[i] for other in others]) for i, value in enumerate(first))


def _varies(value: Any, others: list[Any]) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, str)
    changed = torch.stack([value != other for other in others])
    if _is_float(value) or value.dim() < 2:
        return bool(changed.any())
    return bool(changed.flatten(0, -2).any(0).all())


def replace_floats_with_nan(example_input: ExampleInput) -> Any:
    """Return the example with NaN for all floats in tensors: whatever they reach becomes NaN as well."""
    return map_values(lambda x: x * torch.nan if isinstance(x, Tensor) and _is_float(x) else x, example_input)


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
