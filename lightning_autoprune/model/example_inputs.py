"""Example inputs: how a model is called with one, others of the same kind, and what comes out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_autoprune.tensors.preserve import preserve_buffers

__all__ = [
    "all_vary",
    "any_rows",
    "as_arguments",
    "by_rows",
    "copied",
    "evaluating",
    "outputs",
    "probes",
    "tensors_in",
    "two_rows",
    "unknown",
]

Model = TypeVar("Model", bound=nn.Module)


def _each(function: Callable[[Any], Any], example_input: Any) -> Any:
    """The example with a function applied to all it holds; keyword arguments in any mapping, as a dict."""
    plain = dict(example_input) if isinstance(example_input, Mapping) else example_input  # a tokenizer's is a UserDict
    return torch.utils._pytree.tree_map(function, plain)


def as_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``forward``, copied, as a model may write into them."""
    own = _each(lambda x: x.clone() if isinstance(x, Tensor) else x, example_input)
    if isinstance(own, dict):
        return (), own
    return (tuple(own) if isinstance(own, (tuple, list)) else (own,)), {}


def _rows(example_input: Any) -> int:
    """The length of the first tensor."""
    return next((len(tensor) for tensor in tensors_in(example_input) if tensor.dim()), 0)


def _with_rows(example_input: Any, rows: int) -> Any:
    """The example cut or repeated to so many rows, in all tensors that have as many as the first."""
    first = _rows(example_input)

    def tiled(leaf: Any) -> Any:
        has_rows = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == first > 0
        return leaf[torch.arange(rows, device=leaf.device) % first] if has_rows else leaf

    return _each(tiled, example_input)


def two_rows(model: nn.Module, example_input: Any) -> Any:
    """An example of one row twice; any other as it is, and with a warning where a model does not run on two rows."""
    if _rows(example_input) != 1:
        return example_input
    for inputs, _ in _runs(model, [_with_rows(example_input, 2)]):
        return inputs
    warnings.warn(f"{type(model).__name__} runs on one row alone, and so will its file.", stacklevel=4)
    return example_input


def by_rows(model: nn.Module, example_input: Any) -> list[tuple[Any, list[Tensor]]]:
    """The example with other numbers of rows, where a model runs on them, each with its outputs."""
    return list(_runs(model, (_with_rows(example_input, n) for n in (1, 2, 3, 2 * _rows(example_input) + 1))))


@torch.no_grad()
def _runs(model: nn.Module, candidates: Iterable[Any]) -> Iterator[tuple[Any, list[Tensor]]]:
    """Those inputs on which a model runs, each with its outputs."""
    for inputs in candidates:
        try:
            yield inputs, outputs(model, inputs)
        except Exception:  # of any kind: values of one kind in the place of another, or what a forward refuses
            continue


def any_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The ``dynamic_shapes`` of ``torch.export`` that leave the first dimension of all tensors free."""
    rows = torch.utils._pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None, (args, kwargs)
    )
    return rows[1] if kwargs else rows[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in an output of nested containers, and in the attributes of objects in them."""
    left, seen = [value], set[int]()
    while left:
        for leaf in torch.utils._pytree.tree_leaves(left.pop(0)):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, (nn.Module, type)) and id(leaf) not in seen:
                seen.add(id(leaf))
                left += [getattr(leaf, "__dict__", {}), _slots(leaf)]


def _slots(value: Any) -> dict[str, Any]:
    """What an object without a ``__dict__`` holds, such as one of ``@dataclass(slots=True)``."""
    slots = getattr(type(value), "__slots__", ())
    names = [slots] if isinstance(slots, str) else slots
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def copied(model: Model) -> Model:
    """A deep copy; tensors with a graph, which can't be copied, are detached where a module has them as attributes."""
    held = (leaf for module in model.modules() for leaf in torch.utils._pytree.tree_leaves(vars(module)))
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf})


@torch.no_grad()
def probes(model: nn.Module, example_input: Any) -> list[tuple[Any, list[Tensor]]]:
    """The example, then inputs of the same kind on which a model runs, each with its outputs.

    Floating numbers become normal ones, booleans are drawn, and other values change places with those of other rows. In
    the first of them no boolean, and no integer of several values, is where it was; in two there are zeros at random
    places, as padding would have.
    """
    generator = torch.Generator().manual_seed(0)

    def with_holes(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool:
            return other(tensor, everywhere=False)
        floating = tensor.is_floating_point() or tensor.is_complex()
        shape = (*tensor.shape[:-1], 1) if floating and tensor.dim() > 1 else tensor.shape  # all features of a place
        kept = (torch.rand(shape, generator=generator) < 0.6).to(tensor.device)
        return other(tensor, everywhere=False) * kept if floating else tensor * kept

    def other(tensor: Any, everywhere: bool) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.is_floating_point() or tensor.is_complex():
            scale = float(tensor.std()) if tensor.numel() > 1 and tensor.std() > 0 else 1.0
            return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor)
        if tensor.dtype == torch.bool:
            drawn = (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.device)
            return ~tensor if everywhere else drawn
        if tensor.dim() and not everywhere:  # columns may have ranges of their own
            order = torch.rand(tensor.shape, generator=generator).argsort(0)
            if not torch.equal(changed := tensor.gather(0, order.to(tensor.device)), tensor):
                return changed
        values, places = torch.unique(tensor, return_inverse=True)
        return values.roll(1)[places]

    changes: list[Callable[[Any], Any]] = [partial(other, everywhere=True), with_holes, with_holes]
    changes += [partial(other, everywhere=False)] * 3
    drawn = (_each(change, example_input) for change in changes)
    return [(example_input, outputs(model, example_input)), *_runs(model, drawn)]


def unknown(example_input: Any) -> Any:
    """The example with NaN for all floating numbers in tensors: what they reach is NaN."""
    return _each(
        lambda x: x * torch.nan if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) else x,
        example_input,
    )


def all_vary(inputs: list[Any]) -> bool:
    """Whether all that the first inputs hold has other values in some of the others, integers in each column.

    What is no tensor never has: numbers, and objects in which tensors can't be found.
    """
    first, *others = [torch.utils._pytree.tree_leaves(as_arguments(some)) for some in inputs]

    def varies(x: Any, values: list[Any]) -> bool:
        if not isinstance(x, Tensor):
            return x is None or isinstance(x, str)
        changed = torch.stack([x != value for value in values])
        if x.is_floating_point() or x.is_complex() or x.dim() < 2:
            return bool(changed.any())
        return bool(changed.flatten(0, -2).any(0).all())

    known = others and any(isinstance(x, Tensor) for x in first)
    return bool(known) and all(varies(x, [other[i] for other in others]) for i, x in enumerate(first))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors that a model gives in evaluation mode; its modes, the inputs and the random numbers stay."""
    args, kwargs = as_arguments(inputs)
    with evaluating(model):
        return list(tensors_in(model(*args, **kwargs)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, nothing compiled; afterwards modes, buffers and the random numbers are as they were."""
    modes = {module: module.training for module in model.modules()}
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    eager = set_stance("force_eager") if set_stance else nullcontext()  # compiled code calls no hooks
    try:
        with torch.random.fork_rng(devices=[]), eager, ExitStack() as stack:
            for module in modes:
                stack.enter_context(preserve_buffers(module))
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
