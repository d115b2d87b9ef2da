"""Find channels: the slices of several layers that can only be pruned or removed together.

A channel is made by rows of linear layers and filters of convolutions, passes through normalizations, depthwise
convolutions and functions, and is read by columns of other layers. Additions tie the channels of several layers
together. The dependency graph is that of the package torch-pruning (Fang et al., "DepGraph", CVPR 2023), which needs
one example input. A channel that the graph can't follow is fixed: it must stay. The graph may also follow a channel
wrongly, so the caller must check the result (``removal_trial``).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_autoprune.model.dependency_graph import check_traceable, limit_group_steps, trace_graph
from lightning_autoprune.model.forward import ExampleInput, evaluation_mode

__all__ = ["Channel", "find_channels", "is_depthwise", "weight_dim"]

Slices = dict[str, list[int]]  # indices of rows, columns or entries, by layer name


@dataclass
class Channel:
    """One channel: the slices of layers that belong to it.

    Attributes:
        made_by: rows of linear layers and filters of convolutions that compute it.
        passes: entries of BatchNorm, PReLU and depthwise convolutions on its way.
        read_by: columns of the layers that use it.
        counted_in: by module name, attributes that count what the channel is part of, and how much they shrink by if it
            is removed. Example: ``{"attention": {"num_heads": 1}}``.
        fixed_reason: why the channel must stay; empty if it may be removed.
        successors: for each layer or function that the channel goes through, those that come next. Layers are given by
            name, functions by a number.
    """

    made_by: Slices = field(default_factory=dict)
    passes: Slices = field(default_factory=dict)
    read_by: Slices = field(default_factory=dict)
    counted_in: dict[str, dict[str, int]] = field(default_factory=dict)
    fixed_reason: str = ""
    successors: dict[Any, set[Any]] = field(default_factory=lambda: defaultdict(set))


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution that makes each channel from the same channel of its input alone."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def weight_dim(module: nn.Module, dim: int) -> int:
    """Return the dimension of a layer's weight along which its rows (``dim=0``) or columns (``dim=1``) lie."""
    return 1 - dim if isinstance(module, _ConvTransposeNd) and not is_depthwise(module) else dim


def find_channels(model: nn.Module, example_input: ExampleInput) -> list[Channel]:
    """Find the channels of all linear and convolution layers, in the order of the model.

    Args:
        model: a module; it is left as it was.
        example_input: an :data:`~lightning_autoprune.model.forward.ExampleInput` on which the model runs.

    Returns:
        Channels. Every row and filter is in ``made_by`` of exactly one channel (in ``passes`` for depthwise
        convolutions), except for those that do not contribute to the output.

    Raises:
        AutoPruneError: if the model does not run on the example, or its kind can't be traced (TorchScript, inference
            mode).

    Warns:
        UserWarning: if the model runs, but its graph can't be traced: then all channels are fixed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
        >>> channel = find_channels(model, torch.zeros(1, 1, 4, 4))[1]
        >>> channel.made_by, channel.passes, channel.read_by
        ({'0': [1]}, {'1': [1]}, {'3': [4, 5, 6, 7]})
    """
    check_traceable(model)
    if isinstance(model, (nn.Linear, _ConvNd)):  # torch-pruning has no graph of a single layer
        return _fixed_channels(model)
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in requires_grad:  # the graph is traced by gradients, also through layers that are not trained
            p.requires_grad_(p.is_floating_point())
        with evaluation_mode(model):
            graph, outputs = trace_graph(model, example_input)
            return _collect_channels(model, graph, outputs) if graph else _fixed_channels(model)
    finally:
        for p, flag in requires_grad.items():
            p.requires_grad_(flag)


def _fixed_channels(model: nn.Module) -> list[Channel]:
    """Return one fixed channel for each row and filter."""
    return [
        Channel(made_by={name: [i]}, fixed_reason="its dependency graph can't be traced")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and not is_depthwise(module)
        for i in range(module.weight.shape[weight_dim(module, 0)])
    ]


# Reading channels from the dependency graph


@dataclass(frozen=True)
class _TracedModel:
    """A model's dependency graph, with the properties of the model that can make a channel fixed.

    Attributes:
        graph: the ``DependencyGraph`` of torch-pruning.
        names: names of the model's modules.
        output_functions: the ``grad_fn`` of each output.
        shared_parameters: ids of the parameters that several modules have.
    """

    graph: Any
    names: Mapping[nn.Module, str]
    output_functions: set[Any]
    shared_parameters: set[int]


_Role = Literal["makes", "passes", "reads", "function", "parameter", "barrier"]


def _collect_channels(model: nn.Module, graph: Any, outputs: list[Tensor]) -> list[Channel]:
    """Return the channels that the graph shows, with each row in one channel only."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    traced = _TracedModel(
        graph=graph,
        names={module: name for name, module in model.named_modules()},
        output_functions={output.grad_fn for output in outputs},
        shared_parameters={p for p, count in uses.items() if count > 1},
    )
    channels: list[Channel] = []
    channel_of_row: dict[tuple[str, int], Channel] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)) or is_depthwise(module) or module not in graph.module2node:
            continue
        for i in range(graph.get_out_channels(module)):
            if (name, i) in channel_of_row:
                continue
            channel = _trace_channel(traced, module, i)
            known = {id(other): other for row in _rows(channel) if (other := channel_of_row.get(row))}
            for other in known.values():  # the same channel, traced from another of its rows
                _merge_into(channel, other)
                channels = [c for c in channels if c is not other]
            channel_of_row.update(dict.fromkeys(_rows(channel), channel))
            channels.append(channel)
    return channels


def _rows(channel: Channel) -> list[tuple[str, int]]:
    """Return the rows that make a channel, as layer names and indices."""
    return [(name, i) for name, indices in channel.made_by.items() for i in indices]


def _merge_into(channel: Channel, other: Channel) -> None:
    """Add to a channel what another one has."""
    for slices, other_slices in (
        (channel.made_by, other.made_by),
        (channel.passes, other.passes),
        (channel.read_by, other.read_by),
    ):
        for name, indices in other_slices.items():
            _add_slices(slices, name, indices)
    for key, successors in other.successors.items():
        channel.successors[key] |= successors
    channel.fixed_reason = channel.fixed_reason or other.fixed_reason


def _add_slices(slices: Slices, name: str, indices: list[int]) -> None:
    known = slices.setdefault(name, [])
    known += [i for i in indices if i not in known]


def _trace_channel(traced: _TracedModel, module: Any, row: int) -> Channel:
    """Return the channel that a row of a layer makes, as torch-pruning's graph has it."""
    name = traced.names[module]
    prune = traced.graph.get_pruner_of_module(module).prune_out_channels
    try:
        with limit_group_steps(traced.graph):
            group = traced.graph.get_pruning_group(module, prune, [row])
        return _channel_from_group(traced, group)
    except Exception:  # of any kind: torch-pruning gets some sizes wrong, such as those that recurrent layers read
        return Channel(made_by={name: [row]}, fixed_reason=f"it is unknown which layers read {name!r}")


def _channel_from_group(traced: _TracedModel, group: Any) -> Channel:
    """Return the channel of a group: the slices of its members, and the first reason why it must stay."""
    channel = Channel()
    reasons: list[str] = []
    keys: dict[Any, Any] = {}  # name or number by node of the graph
    for dependency, indices in group:
        node = dependency.target
        keys[node] = traced.names.get(node.module, id(node))
        role = _role(traced, dependency)
        reasons += _reasons_to_stay(traced, node, role, indices)
        if role in ("makes", "passes", "reads") and max(indices) < _slice_count(traced, node.module, role):
            slices = {"makes": channel.made_by, "passes": channel.passes, "reads": channel.read_by}[role]
            _add_slices(slices, traced.names[node.module], indices)
    for node, key in keys.items():
        channel.successors[key] |= {keys[successor] for successor in node.outputs if successor in keys}
    channel.fixed_reason = reasons[0] if reasons else ""
    return channel


def _role(traced: _TracedModel, dependency: Any) -> _Role:
    """Return how a member of a group takes part in its channel.

    Returns:
        - ``"makes"``: rows of a linear layer or filters of a convolution compute the channel.
        - ``"passes"``: the channel goes through entries of BatchNorm, PReLU or a depthwise convolution.
        - ``"reads"``: columns of a linear layer or convolution use the channel.
        - ``"function"``: the channel goes through a function, which has no slices.
        - ``"parameter"``: the channel meets a parameter that belongs to no layer.
        - ``"barrier"``: the channel goes through a layer from which no channel can be removed.
    """
    node, module, graph = dependency.target, dependency.target.module, traced.graph
    if module not in traced.names:
        return "parameter" if node.type.name == "PARAMETER" else "function"
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:  # one slope for all channels
        return "function"
    if is_depthwise(module) or isinstance(module, (_BatchNorm, nn.PReLU)):
        return "passes"
    if isinstance(module, (nn.Linear, _ConvNd)):
        makes = graph.is_out_channel_pruning_fn(dependency.handler)
        reads = graph.is_in_channel_pruning_fn(dependency.handler)
        if makes != reads:
            return "makes" if makes else "reads"
    return "barrier"


def _reasons_to_stay(traced: _TracedModel, node: Any, role: _Role, indices: list[int]) -> Iterator[str]:
    """Yield each reason why a channel with this member must stay."""
    module, name = node.module, traced.names.get(node.module, "")
    if role != "reads" and (node.grad_fn in traced.output_functions or node.type.name == "OUTPUT"):
        yield "it is an output of the model"
    if role == "parameter":
        yield "a parameter of no layer is part of it"
    if role == "barrier":
        yield f"it goes through {name!r}, a {type(module).__name__}"
    if role in ("makes", "reads"):
        if getattr(module, "groups", 1) != 1:
            yield f"{name!r} is a grouped convolution"
        if id(module.weight) in traced.shared_parameters or not isinstance(module.weight, nn.Parameter):
            yield f"{name!r} shares or computes its weight"
    if role in ("makes", "passes", "reads") and max(indices) >= _slice_count(traced, module, role):
        yield f"its position in {name!r} is unknown"


def _slice_count(traced: _TracedModel, module: Any, role: _Role) -> int:
    """Return the number of rows, columns or entries that a layer has for a role."""
    if role == "passes":
        count: int = max(traced.graph.get_out_channels(module), 1)
    else:
        count = module.weight.shape[weight_dim(module, 1 if role == "reads" else 0)]
    return count
