"""Try whether channels can be removed: a dependency graph may follow them wrongly, and code may count on their number.

Examples are ``x.flip(-1)``, a softmax over channels, ``x.split(32, -1)``, ``x / x.shape[-1] ** 0.5`` and a buffer with
an entry per channel. All channels are tried at once, so a model in which none of this happens runs only a few times. If
something is wrong, the layers are narrowed down by halving.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_autoprune.errors import quote_names
from lightning_autoprune.model.channel_removal import move_channels, remove_channels, zero_columns
from lightning_autoprune.model.channels import Channel
from lightning_autoprune.model.example_inputs import run_varied
from lightning_autoprune.model.forward import ExampleInput, RecordedRun, copy_model, run_model
from lightning_autoprune.model.same_outputs import find_mismatch

__all__ = ["RemovalTrial", "fix_unremovable", "narrow_down"]

Item = TypeVar("Item")
Family = Sequence[Channel]

_TOLERANCE = 1e-4  # relative: in another order, channels are summed with other rounding


class RemovalTrial:
    """A copy of a model in which channels are moved and removed, to see whether it still computes the same.

    A family is a list of channels that the same layers make. It passes if

    1. the outputs stay the same when half of its channels are removed, whose columns are 0 before, and likewise for the
       other half;
    2. the outputs stay the same when its channels change places with each other, in two ways.

    The first shows that nothing but their columns reads the channels, and that no code depends on their number. The
    second shows that each column reads the channel that the graph says.

    Args:
        model: the module that the channels are of; it is left as it was.
        example_input: an :data:`~lightning_autoprune.model.forward.ExampleInput` on which the model runs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2))
        >>> trial = RemovalTrial(model, torch.zeros(2, 4))
        >>> [problem] = trial.problems([[Channel(made_by={"0": [i]}, read_by={"2": [i]}) for i in range(6)]])
        >>> problem.startswith("an output changes by")
        True
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, example_input: ExampleInput) -> None:
        self._model = copy_model(model)
        _vary_constants(self._model)
        self._inputs, self._outputs = run_varied(self._model, example_input)

    @torch.no_grad()
    def problems(self, families: Sequence[Family]) -> list[str]:
        """Return what goes wrong with each family; "" if it passes, together with all others that pass."""
        tests: list[Callable[[list[Family]], str]] = [
            partial(self._problem_without, half=0),
            partial(self._problem_without, half=1),
            partial(self._problem_with_moved, shifted=True),
            partial(self._problem_with_moved, shifted=False),
        ]
        passing: list[tuple[int, Family]] = list(enumerate(families))
        problems = [""] * len(families)
        for test in tests:
            passing, failing = narrow_down(passing, partial(_test_families, test))
            for (number, _), problem in failing:
                problems[number] = problem
        return problems

    def _problem_without(self, families: list[Family], half: int) -> str:
        removed: list[Channel] = []
        for family in families:
            order, middle = _random_order(len(family)), len(family) // 2
            removed += [family[i] for i in (order[middle:] if half else order[:middle]) if len(family) > 1]
        with _undone(self._model, removed):
            zero_columns(self._model, removed)
            expected = run_model(self._model, self._inputs)
            remove_channels(self._model, removed)
            return self._problem_of(expected)

    def _problem_with_moved(self, families: list[Family], *, shifted: bool) -> str:
        channels = [channel for family in families for channel in family]
        with _undone(self._model, channels):
            for alike in _alike(channels):
                size = len(alike)
                places = [(i + 1) % size for i in range(size)] if shifted else _random_order(size)
                move_channels(self._model, alike, [alike[i] for i in places])
            return self._problem_of(self._outputs)

    def _problem_of(self, expected: list[torch.Tensor]) -> str:
        return find_mismatch(partial(run_model, self._model), [RecordedRun(self._inputs, expected)], _TOLERANCE)


def fix_unremovable(channels: Sequence[Channel], trial: RemovalTrial) -> None:
    """Mark channels as fixed that can't be removed, in place: all that the same layers make, if one of them can't."""
    families: dict[frozenset[str], list[Channel]] = defaultdict(list)
    for channel in channels:
        if not channel.fixed_reason:
            families[frozenset(channel.made_by)].append(channel)
    for family, problem in zip(families.values(), trial.problems(list(families.values())), strict=True):
        for channel in family if problem else ():
            channel.fixed_reason = f"without some channels of {quote_names(channel.made_by)} {problem}"


def narrow_down(
    items: Sequence[Item], problem: Callable[[list[Item]], str]
) -> tuple[list[Item], list[tuple[Item, str]]]:
    """Find the items that pass a test together, with few tests if most of them do.

    Args:
        items: what to test.
        problem: tests some items together, and returns what is wrong, or "".

    Returns:
        The items that pass, and each other item with its problem.

    Example:
        >>> narrow_down(range(8), lambda some: "has a 5" if 5 in some else "")
        ([0, 1, 2, 3, 4, 6, 7], [(5, 'has a 5')])
    """
    passing: list[Item] = []
    failing: list[tuple[Item, str]] = []
    pending = [list(items)]
    while pending:
        part = pending.pop()
        if not part:
            continue
        if not (found := problem([*passing, *part])):
            passing += part
        elif len(part) == 1:
            failing.append((part[0], found))
        else:
            middle = len(part) // 2
            pending += [part[middle:], part[:middle]]
    return passing, failing


def _test_families(test: Callable[[list[Family]], str], numbered: list[tuple[int, Family]]) -> str:
    return test([family for _, family in numbered])


def _vary_constants(model: nn.Module) -> None:
    """Add random numbers to parameters whose entries are all equal: a scale of 0 hides what it multiplies."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
            size = 0.5 if p.dim() < 2 else 1 / math.sqrt(p[0].numel())
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=size)


def _random_order(size: int) -> list[int]:
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    return order


def _alike(channels: Sequence[Channel]) -> Iterator[list[Channel]]:
    """Yield lists of channels that have the same numbers of slices in the same layers."""
    lists: dict[Any, list[Channel]] = defaultdict(list)
    for channel in channels:
        parts = (channel.made_by, channel.passes, channel.read_by)
        lists[tuple(frozenset((name, len(slices)) for name, slices in part.items()) for part in parts)].append(channel)
    yield from lists.values()


@contextmanager
def _undone(model: nn.Module, channels: Sequence[Channel]) -> Iterator[None]:
    """Undo, after a block, that layers of some channels got other parameters, buffers or attributes."""
    paths = {path for c in channels for path in (*c.made_by, *c.passes, *c.read_by, *c.counted_in)}
    modules = [model.get_submodule(path) for path in paths]
    saved = [(m, m.__dict__.copy(), m._parameters.copy(), m._buffers.copy()) for m in modules]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module.__dict__.update(attributes)
