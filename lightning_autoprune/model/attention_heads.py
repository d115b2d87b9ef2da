"""Finds attention heads: the slices of an attention module's layers that can only be removed together.

A head is made by rows of the layers for queries, keys and values, and read by columns of the layer after the attention.
A graph of operations does not show that. So it is guessed from sizes, for modules that have their number of heads in an
attribute, and tested: a guess is right if the rows can't change the outputs once the columns are 0, and the module
computes the same with one head less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_autoprune.model.channel_removal import remove_channels, zero_slices
from lightning_autoprune.model.channels import Channel, fix_entangled
from lightning_autoprune.model.example_inputs import run_variations
from lightning_autoprune.model.forward import ExampleInput, copy_model, run_model
from lightning_autoprune.model.same_outputs import find_mismatch

__all__ = ["HEAD_COUNT_ATTRIBUTES", "group_attention_heads"]

HEAD_COUNT_ATTRIBUTES = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")


def group_attention_heads(model: nn.Module, channels: list[Channel], example_input: ExampleInput) -> list[Channel]:
    """Return the channels with each attention head as one channel, in place of the channels that it is made of.

    Heads are found in modules that have one of :data:`HEAD_COUNT_ATTRIBUTES`, whose queries, keys and values come from
    linear layers of the module (three, or one for all), and whose ``forward`` runs with fewer heads. This excludes
    ``nn.MultiheadAttention``.

    Args:
        model: the module that the channels are of; it is left as it was.
        channels: the result of :func:`~lightning_autoprune.model.channels.find_channels`; those that share a layer with
            the heads are marked as fixed, in place.
        example_input: an input on which the model runs.
    """
    for path, module in model.named_modules():
        for heads in _candidate_heads(path, module):
            if _can_be_removed_one_by_one(model, path, heads, example_input):
                channels = _replace_by_heads(channels, heads, path)
                break
    return channels


def _replace_by_heads(channels: list[Channel], heads: list[Channel], path: str) -> list[Channel]:
    makers, readers = heads[0].made_by.keys(), heads[0].read_by.keys()
    others = [channel for channel in channels if not channel.made_by.keys() <= makers]
    for channel in others:
        if channel.made_by.keys() & makers or channel.read_by.keys() & readers:
            channel.fixed_reason = channel.fixed_reason or f"it has a part in the attention heads of {path!r}"
    return others + heads


# Guessing


class _HeadLayout(NamedTuple):
    """A way in which the linear layers of a module may make its heads.

    Attributes:
        reader: name of the layer after the attention.
        makers: names of the layers that make queries, keys and values.
        rows: rows by maker and head; shape (makers, heads, …).
    """

    reader: str
    makers: Sequence[str]
    rows: Tensor


def _candidate_heads(path: str, module: nn.Module) -> Iterator[list[Channel]]:
    """Yield all heads of a module, for each attribute that may count them and each layout that the sizes allow."""
    linear = {f"{path}.{name}".lstrip("."): m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    for attribute in HEAD_COUNT_ATTRIBUTES:
        count = vars(module).get(attribute)  # not a property: removing a head sets the attribute
        if not isinstance(count, int) or count < 2:
            continue
        for layout in _candidate_layouts(linear, count):
            columns = torch.arange(linear[layout.reader].in_features).view(count, -1)
            yield [
                Channel(
                    made_by={name: layout.rows[i, head].flatten().tolist() for i, name in enumerate(layout.makers)},
                    read_by={layout.reader: columns[head].tolist()},
                    successors={name: {layout.reader} for name in layout.makers},
                    counted_in={path: {attribute: 1}},
                )
                for head in range(count)
            ]


def _candidate_layouts(linear: Mapping[str, nn.Linear], count: int) -> Iterator[_HeadLayout]:
    """Yield the layouts of ``count`` heads that the sizes of a module's linear layers allow."""
    for reader, layer in linear.items():
        width = layer.in_features
        if width % count:
            continue
        others = {name: other.out_features for name, other in linear.items() if name != reader}
        rows = torch.arange(3 * width)
        for name in (name for name, size in others.items() if size == 3 * width):
            yield _HeadLayout(reader, [name], rows.view(1, 3, count, -1).transpose(1, 2))  # q, k, v of all heads each
            yield _HeadLayout(reader, [name], rows.view(1, count, 3, -1))  # q, k and v head by head
        for names in combinations([name for name, size in others.items() if size == width], 3):
            yield _HeadLayout(reader, names, rows[:width].view(1, count, -1).expand(3, -1, -1))


# Testing


@torch.no_grad()
def _can_be_removed_one_by_one(model: nn.Module, path: str, heads: list[Channel], example_input: ExampleInput) -> bool:
    """Return whether the guess is right, tested with the first and the last head.

    If the module does not run with its number of heads reduced alone, the attributes with the width of all heads are
    reduced as well; they are added to the heads' ``counted_in``.
    """
    fix_entangled(model, heads, example_input)
    if any(head.fixed_reason for head in heads):
        return False
    if all(_is_removable(model, head, example_input) for head in (heads[0], heads[-1])):
        return True
    head_width = len(next(iter(heads[0].read_by.values())))
    attributes = vars(model.get_submodule(path)).items()
    widths = {a: head_width for a, n in attributes if isinstance(n, int) and n == head_width * len(heads)}
    for head in heads:
        head.counted_in[path].update(widths)
    return bool(widths) and all(_is_removable(model, head, example_input) for head in (heads[0], heads[-1]))


def _is_removable(model: nn.Module, head: Channel, example_input: ExampleInput) -> bool:
    """Return whether a model in which the columns of a head are 0 computes the same without the head."""
    trial = copy_model(model)
    for name, columns in head.read_by.items():
        zero_slices(trial.get_submodule(name), columns, 1)
    expected_runs = run_variations(trial, example_input)
    remove_channels(trial, [head])
    return not find_mismatch(partial(run_model, trial), expected_runs, 1e-4)
