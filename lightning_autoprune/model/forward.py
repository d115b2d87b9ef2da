"""Run a model on an example input in evaluation mode, leave it as it was, and collect the output tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lightning_autoprune.tensors.preserve import preserve_buffers
from lightning_autoprune.tensors.random_state import preserve_random

__all__ = [
    "ExampleInput",
    "RecordedRun",
    "as_arguments",
    "copy_model",
    "evaluation_mode",
    "map_values",
    "run_model",
    "tensors_in",
]

ExampleInput: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | object
"""An input that a model's ``forward`` accepts.

A tuple or list holds positional arguments. A mapping (a dict, or the ``UserDict`` that tokenizers return) holds keyword
arguments. Anything else, such as a tensor or a batch object, is the only argument.
"""

Model = TypeVar("Model", bound=nn.Module)


class RecordedRun(NamedTuple):
    """Inputs, and the tensors that a model returned for them."""

    inputs: Any
    outputs: list[Tensor]


def as_arguments(example_input: ExampleInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for ``forward``; tensors are cloned, as a model may write into them."""
    arguments = map_values(lambda x: x.clone() if isinstance(x, Tensor) else x, example_input)
    if isinstance(arguments, dict):
        return (), arguments
    return (tuple(arguments) if isinstance(arguments, (tuple, list)) else (arguments,)), {}


def map_values(function: Callable[[Any], Any], example_input: ExampleInput) -> Any:
    """Return the example with a function applied to each value in its containers; any mapping becomes a dict."""
    plain = dict(example_input) if isinstance(example_input, Mapping) else example_input  # pytree ignores a UserDict
    return torch.utils._pytree.tree_map(function, plain)


def run_model(model: nn.Module, inputs: ExampleInput) -> list[Tensor]:
    """Return the tensors that a model outputs in evaluation mode.

    The model's modes and buffers, the inputs and all random numbers stay as they were.
    """
    args, kwargs = as_arguments(inputs)
    with evaluation_mode(model):
        return list(tensors_in(model(*args, **kwargs)))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode without compiled code; restore modes, buffers and random numbers afterwards."""
    modes = {module: module.training for module in model.modules()}
    set_stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    eager = set_stance("force_eager") if set_stance else nullcontext()  # compiled code calls no hooks
    try:
        with preserve_random(), eager, ExitStack() as stack:
            for module in modes:
                stack.enter_context(preserve_buffers(module))
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested containers, and in the attributes of objects in them."""
    pending, visited = [value], set[int]()
    while pending:
        for leaf in torch.utils._pytree.tree_leaves(pending.pop(0)):
            if isinstance(leaf, Tensor):
                yield leaf
            elif not isinstance(leaf, (nn.Module, type)) and id(leaf) not in visited:
                visited.add(id(leaf))
                pending += [getattr(leaf, "__dict__", {}), _slot_values(leaf)]


def _slot_values(value: Any) -> dict[str, Any]:
    """Return the attributes in an object's ``__slots__``, as ``@dataclass(slots=True)`` makes them."""
    slots = getattr(type(value), "__slots__", ())
    names = [slots] if isinstance(slots, str) else slots
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def copy_model(model: Model) -> Model:
    """Return a deep copy, in which tensors that carry a graph are detached.

    A module may hold such tensors as attributes, for example the features of its last forward. ``deepcopy`` alone
    refuses them.
    """
    attributes = (leaf for module in model.modules() for leaf in torch.utils._pytree.tree_leaves(vars(module)))
    with_graph = [t for t in attributes if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in with_graph})
