"""Attention heads: what of the layers of an attention module goes only as one.

A head is made by rows of the layers of queries, keys and values, and read by columns of the one after the attention. A
graph of operations does not show that. It is guessed from sizes, where a module has the number of its heads in an
attribute, and tried: a guess is right if the rows have no say without the columns, and the module with a head less
gives the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from lightning_autoprune.channels import Channel, fix_entangled
from lightning_autoprune.dead import clear, remove
from lightning_autoprune.inputs import disagreement, probes

__all__ = ["HEAD_NUMBERS", "with_heads"]

HEAD_NUMBERS = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")


def with_heads(model: nn.Module, channels: list[Channel], example_input: Any) -> list[Channel]:
    """Puts attention heads in the place of the channels that they are made of.

    Those of modules with an attribute of :data:`HEAD_NUMBERS`, whose queries, keys and values are made by linear layers
    in it, three or one for all, and that run with fewer heads. ``nn.MultiheadAttention`` does not.

    Args:
        model: the module that they are of; it is left as it was.
        channels: those that :func:`~lightning_autoprune.channels.find_channels` gave.
        example_input: what its ``forward`` takes.
    """
    for path, module in model.named_modules():
        right = (heads for heads in _guesses(path, module) if _come_apart(model, heads, example_input))
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
        count = getattr(module, attribute, None)
        if not isinstance(count, int) or count < 2:
            continue
        for reader, width in ((name, layer.in_features) for name, layer in linear.items()):
            if width % count:
                continue
            by_width = {n: [m for m in linear if m != reader and linear[m].out_features == n * width] for n in (1, 3)}
            rows = torch.arange(3 * width)
            ways: list[tuple[tuple[str, ...], Tensor]] = []  # who makes them; rows by layer and head
            for name in by_width[3]:
                ways += [((name,), rows.view(1, 3, count, -1).transpose(1, 2)), ((name,), rows.view(1, count, 3, -1))]
            three = rows[:width].view(1, count, -1).expand(3, -1, -1)
            ways += [(names, three) for names in combinations(by_width[1], 3)]
            # the width of all heads together may be an attribute as well
            wide = {a: width // count for a, n in vars(module).items() if n == width and isinstance(n, int)}
            for names, places in ways:
                for others in [{}, wide] if wide else [{}]:
                    yield [
                        Channel(
                            made={name: places[i, head].flatten().tolist() for i, name in enumerate(names)},
                            read={reader: rows[:width].view(count, -1)[head].tolist()},
                            follows={name: {reader} for name in names},
                            counted={path: {attribute: 1, **others}},
                        )
                        for head in range(count)
                    ]


@torch.no_grad()
def _come_apart(model: nn.Module, heads: list[Channel], example_input: Any) -> bool:
    """Whether the rows of heads have no say without their columns, and the model runs with a head less."""
    fix_entangled(model, heads, example_input)
    if any(head.fixed for head in heads):
        return False
    for head in (heads[0], heads[-1]):
        small = copy.deepcopy(model)
        for name, columns in head.read.items():
            clear(small.get_submodule(name), columns, 1)
        tried = probes(small, example_input)
        remove(small, [head])
        if disagreement(small, tried, 1e-4):
            return False
    return True
