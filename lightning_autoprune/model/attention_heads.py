"""Find attention heads: the slices of an attention module's layers that can only be removed together.

A head is made by rows of the layers for queries, keys and values, and read by columns of the layer after the attention.
A graph of operations does not show that. So it is guessed from sizes, for modules that have their number of heads in an
attribute, and tested: a guess is right if heads can change places, and the module computes the same without some.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_autoprune.model.channels import Channel
from lightning_autoprune.model.removal_trial import RemovalTrial

__all__ = ["HEAD_COUNT_ATTRIBUTES", "group_attention_heads"]

HEAD_COUNT_ATTRIBUTES = ("num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads")


def group_attention_heads(model: nn.Module, channels: list[Channel], trial: RemovalTrial) -> list[Channel]:
    """Return the channels with each attention head as one channel, in place of the channels that it is made of.

    Heads are found in modules that have one of :data:`HEAD_COUNT_ATTRIBUTES`, whose queries, keys and values come from
    linear layers of the module (three, or one for all), and whose ``forward`` runs with fewer heads. This excludes
    ``nn.MultiheadAttention``.

    Modules of one class have the same layout as a rule. So a guess is tested on one of them first, and if it is right,
    on all others at once.

    Args:
        model: the module that the channels are of; it is left as it was.
        channels: the result of :func:`~lightning_autoprune.model.channels.find_channels`; those that share a layer with
            the heads are marked as fixed, in place.
        trial: a trial of the same model.
    """
    guesses: dict[type[nn.Module], dict[str, list[list[Channel]]]] = defaultdict(dict)
    for path, module in model.named_modules():
        if found := list(_candidate_heads(path, module)):
            guesses[type(module)][path] = found
    for pending in guesses.values():
        while pending:
            first, *others = pending
            right = next((k for k, heads in enumerate(pending[first]) if trial.problems([heads]) == [""]), None)
            tested = [first]
            if right is not None:
                tested += [path for path in others if right < len(pending[path])]
                problems = ["", *trial.problems([pending[path][right] for path in tested[1:]])]
                tested = [path for path, problem in zip(tested, problems, strict=True) if not problem]
                for path in tested:
                    channels = _replace_by_heads(channels, pending[path][right], path)
            for path in tested:
                del pending[path]
    return channels


def _replace_by_heads(channels: list[Channel], heads: list[Channel], path: str) -> list[Channel]:
    """Return the channels with those that the heads consist of replaced, and those that overlap with them fixed."""
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
    """Yield all heads of a module, for each attribute that may count them and each layout that the sizes allow.

    Each is yielded twice if attributes of the module have the width of all heads: these may count what the heads are
    part of too.
    """
    linear = {f"{path}.{name}".lstrip("."): m for name, m in module.named_children() if isinstance(m, nn.Linear)}
    for attribute in HEAD_COUNT_ATTRIBUTES:
        count = vars(module).get(attribute)  # not a property: removing a head sets the attribute
        if not isinstance(count, int) or count < 2:
            continue
        for layout in _candidate_layouts(linear, count):
            width = linear[layout.reader].in_features
            columns = torch.arange(width).view(count, -1)
            widths = {name: width // count for name, n in vars(module).items() if isinstance(n, int) and n == width}
            for counted in ({attribute: 1}, {attribute: 1, **widths})[: 2 if widths else 1]:
                yield [
                    Channel(
                        made_by={name: layout.rows[i, head].flatten().tolist() for i, name in enumerate(layout.makers)},
                        read_by={layout.reader: columns[head].tolist()},
                        successors={name: {layout.reader} for name in layout.makers},
                        counted_in={path: dict(counted)},
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
