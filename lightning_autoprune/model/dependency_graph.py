"""The dependency graph of torch-pruning (Fang et al., "DepGraph", CVPR 2023), with what it leaves out mended.

Its private parts are read and changed here alone.
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
from lightning_autoprune.model.example_inputs import as_arguments, tensors_in

__all__ = ["bounded_groups", "check_traceable", "trace"]

_STEPS = 64  # that a group may take from one part to another


def check_traceable(model: nn.Module) -> None:
    """Raises for modules of which there is no graph."""
    name = type(model).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise AutoPruneError(
            f"{name} is TorchScript, in which channels can't be found: give the module it was made of."
        )
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise AutoPruneError(
            f"The channels of {name} are found by gradients, which there are none of in `torch.inference_mode()`: make"
            " the model, and call this, outside of it (`torch.no_grad()` is allowed)."
        )


def trace(model: nn.Module, example_input: Any) -> tuple[Any, list[Tensor]]:
    """The graph of torch-pruning, None where it has none for a model that runs, and the outputs."""
    try:
        import torch_pruning
    except ImportError as error:
        raise AutoPruneError(
            "Finding channels needs the package torch-pruning: pip install 'lightning-autoprune[shrink]'."
        ) from error
    args, kwargs = as_arguments(example_input)
    given: list[Tensor] = []
    running: list[str] = []  # layers whose forward has begun and not ended

    def forward(*_: Any) -> list[Tensor]:
        given[:] = tensors_in(model(*args, **kwargs))
        return given

    handles = [
        module.register_forward_pre_hook(lambda *_, n=name: running.append(n)) for name, module in _leaves(model)
    ]
    handles += [module.register_forward_hook(lambda *_: running.pop() and None) for _, module in _leaves(model)]
    graph = torch_pruning.DependencyGraph()
    build = graph._build_dependency

    def with_widths(nodes: dict[Any, Any]) -> None:
        build(nodes)  # the last step before widths are told from the nodes
        for node in nodes.values():
            if node.type.name == "CONCAT":
                _add_gap(node)

    graph._build_dependency = with_widths
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(model, args or kwargs, forward_fn=forward, verbose=False)
    except Exception as error:
        if given:
            warnings.warn(
                f"All channels of {type(model).__name__} stay: how its layers hang together can't be told"
                f" ({type(error).__name__}: {error}).",
                stacklevel=4,
            )
            return None, given
        where = f"layer {running[-1]!r} raised " if running else ""
        shapes = [tuple(t.shape) for t in tensors_in((args, kwargs))]
        raise AutoPruneError(
            f"{type(model).__name__} could not be {'run' if running else 'traced'} on an example of shapes {shapes}:"
            f" {where}{type(error).__name__}: {error}. Give an `example_input` on which the model runs as it is."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return graph, given


def _add_gap(concatenation: Any) -> None:
    """Says how wide the part of a concatenation is that torch-pruning leaves out, as it has no gradient: an input."""
    step = concatenation.grad_fn
    if not hasattr(step, "_saved_dim"):  # a function of the user's own
        return
    gaps = [place for place, (before, _) in enumerate(step.next_functions) if before is None]
    together = bool(gaps) and gaps[-1] - gaps[0] == len(gaps) - 1  # otherwise their sum alone is known
    if together and len(gaps) + len(concatenation.inputs) == len(step.next_functions):
        dim = step._saved_dim - 2**64 if step._saved_dim >= 2**63 else step._saved_dim
        known = sum(before._input_metadata[i].shape[dim] for before, i in step.next_functions if before)
        width = step._input_metadata[0].shape[dim] - known
        concatenation.inputs.insert(gaps[0], type(concatenation)(nn.Parameter(torch.empty(width)), None))


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not list(module.children()))


@contextmanager
def bounded_groups(graph: Any) -> Iterator[None]:
    """Stops torch-pruning where it takes a slice of a sequence for one of channels, and would follow it without end."""
    module: Any = sys.modules[type(graph).__module__]
    whole = module.Group
    steps: Counter[tuple[Any, Any]] = Counter()

    def add_dep(group: Any, dep: Any, idxs: Any) -> Any:
        steps[dep.target, dep.handler] += 1
        if steps[dep.target, dep.handler] > _STEPS:
            raise ValueError("a group without end")
        return whole.add_dep(group, dep, idxs)

    module.Group = type("Group", (whole,), {"add_dep": add_dep})
    try:
        yield
    finally:
        module.Group = whole
