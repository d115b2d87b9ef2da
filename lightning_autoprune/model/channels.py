"""Which parts of which layers make up a channel: what can only be removed, or pruned, as one.

A channel is made by rows of linear layers and filters of convolutions, passes through normalizations, depthwise
convolutions and functions, and is read by columns of other layers. Additions tie the channels of several layers
together. The dependency graph is that of the package torch-pruning (Fang et al., "DepGraph", CVPR 2023), which needs
one example input; what it can't follow is ``fixed`` here, and what it may follow wrongly is for the caller to check.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_autoprune.errors import listed
from lightning_autoprune.model.dependency_graph import bounded_groups, check_traceable, trace
from lightning_autoprune.model.example_inputs import copied, evaluating, outputs, probes
from lightning_autoprune.model.same_outputs import difference, spreads

__all__ = ["Channel", "find_channels", "fix_entangled", "is_depthwise", "weight_dim"]

Parts = dict[str, list[int]]


@dataclass
class Channel:
    """One channel: layers by name, with the positions that belong to it.

    Attributes:
        made: rows of linear layers, filters of convolutions.
        passed: entries of BatchNorm, PReLU and depthwise convolutions on its way.
        read: columns of the layers that use it.
        counted: attributes that count what the channel is part of, by module name, and by how much they shrink with it.
        fixed: why it must stay; empty if it may go.
        follows: which parts come next after each, by name (or number, for functions).
    """

    made: Parts = field(default_factory=dict)
    passed: Parts = field(default_factory=dict)
    read: Parts = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)
    fixed: str = ""
    follows: dict[Any, set[Any]] = field(default_factory=lambda: defaultdict(set))


def find_channels(model: nn.Module, example_input: Any) -> list[Channel]:
    """Finds the channels of all linear and convolution layers, in the order of the model.

    Args:
        model: a module; it is left as it was.
        example_input: what its ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Every row and filter is in exactly one channel's ``made`` (``passed``, for depthwise convolutions), but for
        those that have no part in the output.

    Raises:
        AutoPruneError: if the model does not run on the example, or is not one whose graph can be traced (TorchScript,
            inference mode).

    Warns:
        UserWarning: if the model runs, but its graph can't be told: all channels are fixed.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
        >>> channel = find_channels(model, torch.zeros(1, 1, 4, 4))[1]
        >>> channel.made, channel.passed, channel.read
        ({'0': [1]}, {'1': [1]}, {'3': [4, 5, 6, 7]})
    """
    check_traceable(model)
    if isinstance(model, (nn.Linear, _ConvNd)):  # torch-pruning has no graph of a layer alone
        return _all_fixed(model)
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in trained:
            p.requires_grad_(p.is_floating_point())
        with evaluating(model):
            graph, given = trace(model, example_input)
            return _collect(model, graph, given) if graph else _all_fixed(model)
    finally:
        for p, flag in trained.items():
            p.requires_grad_(flag)


@torch.no_grad()
def fix_entangled(model: nn.Module, channels: list[Channel], example_input: Any) -> None:
    """Marks as ``fixed`` channels that still change the outputs when the columns that should read them are 0.

    The graph does not see every way of a channel: another order of channels, a softmax over them. Half of the channels
    that layers make together are tried at a time, on a copy, so that each two of them are once in different halves.

    Args:
        model: the module that they are of; it is left as it was.
        channels: those that :func:`find_channels` gave.
        example_input: what its ``forward`` takes.
    """
    trial, generator = copied(model), torch.Generator().manual_seed(0)
    inputs, _ = probes(model, example_input)[-1]
    together: dict[frozenset[str], list[Channel]] = defaultdict(list)
    for channel in channels:
        if not channel.fixed:
            together[frozenset(channel.made)].append(channel)

    def fill(parts: Parts, dim: int, scale: float) -> None:
        """Overwrites rows (0) or columns (1) with normal numbers."""
        for name, indices in parts.items():
            weight = trial.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            index = torch.tensor(indices, device=weight.device)
            along = weight_dim(trial.get_submodule(name), dim)
            values = scale * torch.randn(weight.index_select(along, index).shape, generator=generator)
            weight.index_copy_(along, index, values.to(weight))

    def entangled(some: list[Channel]) -> bool:
        """Whether what makes some channels has a say where nothing should read them."""
        layers = {trial.get_submodule(name) for channel in some for name in (*channel.made, *channel.read)}
        before = [(layer.weight, layer.weight.clone()) for layer in layers]  # type: ignore[operator]
        for channel in some:
            fill(channel.read, 1, 0.0)
        aims = outputs(trial, inputs)
        for channel in some:
            fill(channel.made, 0, 1.0)
        changes = difference(outputs(trial, inputs), aims, spreads([aims]), 1e-4)
        for weight, old in before:
            weight.copy_(old)  # type: ignore[operator]
        return bool(changes)

    for group in together.values():
        if any(entangled(some) for some in _halves(group) if some):
            for channel in group:
                channel.fixed = f"{listed(channel.made)} reaches the outputs in a way that can't be told"


def _halves(group: list[Channel]) -> Iterator[list[Channel]]:
    """By each bit of a channel's place in the group."""
    for bit in range(max((len(group) - 1).bit_length(), 1)):
        for value in (0, 1):
            yield [channel for place, channel in enumerate(group) if place >> bit & 1 == value]


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel of a convolution is made of the same channel of its input alone."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def weight_dim(module: nn.Module, dim: int) -> int:
    """The dimension of a layer's weight that has its rows (0) or columns (1)."""
    return 1 - dim if isinstance(module, _ConvTransposeNd) and not is_depthwise(module) else dim


def _collect(model: nn.Module, graph: Any, given: list[Tensor]) -> list[Channel]:
    names = {module: name for name, module in model.named_modules()}
    ends = {tensor.grad_fn for tensor in given}
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = {p for p, count in uses.items() if count > 1}
    channels: list[Channel] = []
    owner: dict[tuple[str, int], Channel] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)) or is_depthwise(module) or module not in graph.module2node:
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        for i in range(graph.get_out_channels(module)):
            if (name, i) in owner:
                continue
            try:
                with bounded_groups(graph):
                    group = graph.get_pruning_group(module, prune, [i])
                channel = _channel(graph, group, names, ends, shared)
            except Exception:  # of any kind: sizes that torch-pruning tells wrongly, of what recurrent layers read
                channel = Channel(made={name: [i]}, fixed=f"where {name!r} is read can't be told")
            for other in {id(o): o for key in _rows(channel) if (o := owner.get(key))}.values():
                _merge(channel, other)  # seen from another of its rows
                channels = [c for c in channels if c is not other]
            owner.update(dict.fromkeys(_rows(channel), channel))
            channels.append(channel)
    return channels


def _all_fixed(model: nn.Module) -> list[Channel]:
    """A channel that must stay for each row and filter."""
    return [
        Channel(made={name: [i]}, fixed="its graph can't be told")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, _ConvNd)) and not is_depthwise(module)
        for i in range(module.weight.shape[weight_dim(module, 0)])
    ]


def _rows(channel: Channel) -> list[tuple[str, int]]:
    return [(name, i) for name, indices in channel.made.items() for i in indices]


def _channel(graph: Any, group: Any, names: Mapping[nn.Module, str], ends: set[Any], shared: set[int]) -> Channel:
    channel, reasons = Channel(), []
    nodes: dict[Any, Any] = {}
    for dep, indices in group:
        node, module = dep.target, dep.target.module
        name = names.get(module, "")
        nodes[node] = name if module in names else id(node)
        outward, inward = graph.is_out_channel_pruning_fn(dep.handler), graph.is_in_channel_pruning_fn(dep.handler)
        layer = isinstance(module, (nn.Linear, _ConvNd)) and not is_depthwise(module) and outward != inward
        reads = layer and inward
        if not reads and (node.grad_fn in ends or node.type.name == "OUTPUT"):
            reasons.append("it is an output of the model")
        if module not in names:
            if node.type.name == "PARAMETER":
                reasons.append("a parameter of no layer is part of it")
            continue
        if layer:
            part, size = channel.read if reads else channel.made, module.weight.shape[weight_dim(module, int(reads))]
            if getattr(module, "groups", 1) != 1:
                reasons.append(f"{name!r} is a grouped convolution")
            if id(module.weight) in shared or not isinstance(module.weight, nn.Parameter):
                reasons.append(f"{name!r} shares or computes its weight")
        elif isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue  # one slope for all channels: a function
        elif is_depthwise(module) or isinstance(module, (_BatchNorm, nn.PReLU)):
            part, size = channel.passed, max(graph.get_out_channels(module), 1)
        else:
            reasons.append(f"it goes through {name!r}, a {type(module).__name__}")
            continue
        if max(indices) >= size:
            reasons.append(f"its place in {name!r} can't be told")
            continue
        _add(part, name, indices)
    for node, key in nodes.items():
        channel.follows[key] |= {nodes[after] for after in node.outputs if after in nodes}
    channel.fixed = reasons[0] if reasons else ""
    return channel


def _add(part: Parts, name: str, indices: list[int]) -> None:
    known = part.setdefault(name, [])
    known += [i for i in indices if i not in known]


def _merge(channel: Channel, other: Channel) -> None:
    for mine, theirs in ((channel.made, other.made), (channel.passed, other.passed), (channel.read, other.read)):
        for name, indices in theirs.items():
            _add(mine, name, indices)
    for key, after in other.follows.items():
        channel.follows[key] |= after
    channel.fixed = channel.fixed or other.fixed
