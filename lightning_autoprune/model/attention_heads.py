"""Attention heads: what of the layers of an attention module goes only as one.

A head is made by rows of the layers of queries, keys and values, and read by columns of the one after the attention. A
graph of operations does not show that. It is guessed from sizes, where a module has the number of its heads in an
attribute, and tried: a guess is right if the rows have no say without the columns, and the module with a head less
gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.model.channel_removal import remove_channels, zero_slices
from lightning_autoprune.model.channels import Channel, fix_entangled
from lightning_autoprune.model.example_inputs import copied, outputs, probes
from lightning_autoprune.model.same_outputs import disagreement

__all__ = ["HEAD_NUMBERS", "with_heads"]

HEAD_NUMBERS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")


def with_heads(model: nn.Module, channels: list[Channel], example_input: Any) -> list[Channel]:
    """Puts attention heads in the place of the channels that they are made of.

    Those of modules with an attribute of :data:`HEAD_NUMBERS`, whose queries, keys and values are made by linear layers
    in it, three or one for all, and that run with fewer heads. ``nn.MultiheadAttention`` does not.

    Args:
        model: the module that they are of; it is left as it was.
        channels: those that :func:`~lightning_autoprune.model.channels.find_channels` gave.
        example_input: what its ``forward`` takes.
    """
    for path, module in model.named_modules():
        right = (heads for heads in _guesses(path, module) if _come_apart(model, path, heads, example_input))
        if heads := next(right, []):
            layers = heads[0].made.keys()
            channels = [channel for channel in channels if not channel.made.keys() <= layers]
            for channel in channels:
                if channel.made.keys() & layers or channel.read.keys() & heads[0].read.keys():
                    channel.fixed = channel.fixed or f"it has a part in the attention heads of {path!r}"
            channels += heads
    return channels


def _guesses(path: str, module: nn.Module) -> Iterator[list[Channel]]:
    """All heads of a module, in each way that the sizes of its linear layers allow."""
    linear = {f"{path}.{name}".lstrip("."): m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    for attribute in HEAD_NUMBERS:
        count = vars(module).get(attribute)  # no property: the number is to be changed
        if not isinstance(count, int) or count < 2:
            continue
        for reader, names, places in _ways(linear, count):
            columns = torch.arange(linear[reader].in_features).view(count, -1)
            yield [
                Channel(
                    made={name: places[i, head].flatten().tolist() for i, name in enumerate(names)},
                    read={reader: columns[head].tolist()},
                    follows={name: {reader} for name in names},
                    counted={path: {attribute: 1}},
                )
                for head in range(count)
            ]


def _ways(linear: Mapping[str, nn.Linear], count: int) -> Iterator[tuple[str, Sequence[str], Tensor]]:
    """Which layer may read so many heads, which may make them, and the rows by maker and head."""
    for reader, layer in linear.items():
        width = layer.in_features
        if width % count:
            continue
        by_width = {n: [m for m in linear if m != reader and linear[m].out_features == n * width] for n in (1, 3)}
        rows = torch.arange(3 * width)
        for name in by_width[3]:
            yield reader, [name], rows.view(1, 3, count, -1).transpose(1, 2)
            yield reader, [name], rows.view(1, count, 3, -1)
        for names in combinations(by_width[1], 3):
            yield reader, names, rows[:width].view(1, count, -1).expand(3, -1, -1)


@torch.no_grad()
def _come_apart(model: nn.Module, path: str, heads: list[Channel], example_input: Any) -> bool:
    """Whether the rows of heads have no say without their columns, and the model runs with a head less."""
    fix_entangled(model, heads, example_input)
    if any(head.fixed for head in heads):
        return False
    if all(_can_go(model, head, example_input) for head in (heads[0], heads[-1])):
        return True
    # the width of all heads together may be an attribute as well
    size = len(next(iter(heads[0].read.values())))
    wide = {
        a: size for a, n in vars(model.get_submodule(path)).items() if isinstance(n, int) and n == size * len(heads)
    }
    for head in heads:
        head.counted[path].update(wide)
    return bool(wide) and all(_can_go(model, head, example_input) for head in (heads[0], heads[-1]))


def _can_go(model: nn.Module, head: Channel, example_input: Any) -> bool:
    """Whether a model without a head, whose columns are 0, is the same function."""
    small = copied(model)
    for name, columns in head.read.items():
        zero_slices(small.get_submodule(name), columns, 1)
    tried = probes(small, example_input)
    remove_channels(small, [head])
    return not disagreement(partial(outputs, small), tried, 1e-4)
