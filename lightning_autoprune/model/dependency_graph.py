"""Builds the dependency graph of torch-pruning (Fang et al., "DepGraph", CVPR 2023), and works around its gaps.

This is the only module that reads or changes private parts of torch-pruning.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.model.forward import ExampleInput, as_arguments, tensors_in

__all__ = ["check_traceable", "limit_group_steps", "trace_graph"]

_MAX_STEPS = 64  # how often a group may come to the same layer in the same way


def check_traceable(model: nn.Module) -> None:
    """Raise an error if a model is of a kind that can't be traced.

    Raises:
        AutoPruneError: for TorchScript, and in inference mode.
    """
    name = type(model).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise AutoPruneError(
            f"{name} is TorchScript, in which channels can't be found: give the module it was made of."
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise AutoPruneError(
            f"The channels of {name} are found by gradients, which do not exist in `torch.inference_mode()`: make the"
            " model, and call this, outside of it (`torch.no_grad()` is allowed)."
        )


def trace_graph(model: nn.Module, example_input: ExampleInput) -> tuple[Any, list[Tensor]]:
    """Trace the dependency graph of a model.

    Returns:
        The ``DependencyGraph`` of torch-pruning (None, with a warning, if the model runs but can't be traced), and the
        model's outputs.

    Raises:
        AutoPruneError: if torch-pruning is not installed, or the model does not run on the example.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise AutoPruneError(
            "Finding channels needs the package torch-pruning: pip install 'lightning-autoprune[shrink]'."
        ) from error
    args, kwargs = as_arguments(example_input)
    outputs: list[Tensor] = []
    running_layers: list[str] = []  # their forward has begun and not ended

    def forward(*_: Any) -> list[Tensor]:
        outputs[:] = tensors_in(model(*args, **kwargs))
        return outputs

    handles = [
        module.register_forward_pre_hook(lambda *_, n=name: running_layers.append(n)) for name, module in _leaves(model)
    ]
    handles += [module.register_forward_hook(lambda *_: running_layers.pop() and None) for _, module in _leaves(model)]
    graph = torch_pruning.DependencyGraph()
    _complete_concatenations(graph)
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(model, args or kwargs, forward_fn=forward, verbose=False)
    except Exception as error:
        if outputs:
            warnings.warn(
                f"All channels of {type(model).__name__} stay: its dependency graph can't be traced"
                f" ({type(error).__name__}: {error}).",
                stacklevel=4,
            )
            return None, outputs
        where = f"layer {running_layers[-1]!r} raised " if running_layers else ""
        shapes = [tuple(t.shape) for t in tensors_in((args, kwargs))]
        raise AutoPruneError(
            f"{type(model).__name__} could not be {'run' if running_layers else 'traced'} on an example of shapes"
            f" {shapes}: {where}{type(error).__name__}: {error}. Give an `example_input` on which the model runs as it"
            " is."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return graph, outputs


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not list(module.children()))


def _complete_concatenations(graph: Any) -> None:
    """Make a graph, when it is built, add to concatenations the inputs that torch-pruning leaves out."""
    build_dependency = graph._build_dependency

    def build_with_all_inputs(nodes: dict[Any, Any]) -> None:
        build_dependency(nodes)  # the last step before torch-pruning reads the widths from the nodes
        for node in nodes.values():
            if node.type.name == "CONCAT":
                _add_missing_input(node)

    graph._build_dependency = build_with_all_inputs


def _add_missing_input(concatenation: Any) -> None:
    """Add the width of the inputs that have no gradient to a concatenation, so that later ones are at their offset.

    Several such inputs are added as one if they are adjacent. Otherwise only the sum of their widths is known, and
    nothing is added.
    """
    function = concatenation.grad_fn
    if not hasattr(function, "_saved_dim"):  # a function that the user has named like a concatenation
        return
    gaps = [place for place, (source, _) in enumerate(function.next_functions) if source is None]
    adjacent = bool(gaps) and gaps[-1] - gaps[0] == len(gaps) - 1
    if adjacent and len(gaps) + len(concatenation.inputs) == len(function.next_functions):
        dim = function._saved_dim - 2**64 if function._saved_dim >= 2**63 else function._saved_dim  # saved as unsigned
        known = sum(source._input_metadata[i].shape[dim] for source, i in function.next_functions if source)
        width = function._input_metadata[0].shape[dim] - known
        concatenation.inputs.insert(gaps[0], type(concatenation)(nn.Parameter(torch.empty(width)), None))


@contextmanager
def limit_group_steps(graph: Any) -> Iterator[None]:
    """Make torch-pruning raise an error for a group that it would follow without end.

    That happens if it takes a slice of a sequence for a slice of channels.
    """
    module: Any = sys.modules[type(graph).__module__]
    original_group = module.Group
    steps: Counter[tuple[Any, Any]] = Counter()

    def add_dep(group: Any, dep: Any, idxs: Any) -> Any:
        steps[dep.target, dep.handler] += 1
        if steps[dep.target, dep.handler] > _MAX_STEPS:
            raise ValueError("a group without end")
        return original_group.add_dep(group, dep, idxs)

    module.Group = type("Group", (original_group,), {"add_dep": add_dep})
    try:
        yield
    finally:
        module.Group = original_group
