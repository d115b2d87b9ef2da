"""Example inputs are called, copied, varied and cut or repeated to rows, whatever holds their tensors."""

from __future__ import annotations

import warnings
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_autoprune.model.example_inputs import all_vary, as_arguments, by_rows, probes, tensors_in, two_rows
from lightning_autoprune.model.same_outputs import difference, spreads


class Tokens(nn.Module):
    """A mean over the tokens that a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        return (self.layer(self.embed(ids)) * mask[..., None]).mean(1)


def example(rows: int, kind: type) -> object:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(rows)])
    mask = torch.ones(rows, 3, dtype=torch.bool)
    return (ids, mask) if kind is tuple else kind({"ids": ids, "mask": mask})


KINDS = pytest.mark.parametrize("kind", [tuple, dict, UserDict])  # what a tokenizer gives is a UserDict


@KINDS
def test_arguments_are_copies_and_the_example_stays(kind):
    given = example(2, kind)
    args, kwargs = as_arguments(given)
    for tensor in tensors_in((args, kwargs)):
        tensor.zero_()
    assert all(tensor.any() for tensor in tensors_in(given))


@KINDS
def test_an_example_of_one_row_is_repeated_and_one_of_several_is_not(kind):
    model, several = Tokens(), example(3, kind)
    assert [len(tensor) for tensor in tensors_in(two_rows(model, example(1, kind)))] == [2, 2]
    assert two_rows(model, several) is several


@KINDS
def test_a_model_is_run_on_other_numbers_of_rows(kind):
    runs = by_rows(Tokens(), example(3, kind))
    assert [[len(tensor) for tensor in tensors_in(inputs)] for inputs, _ in runs] == [[n, n] for n in (1, 2, 3, 7)]
    assert [len(found) for _, (found,) in runs] == [1, 2, 3, 7]


@KINDS
def test_all_that_an_example_holds_is_varied(kind):
    given = example(4, kind)
    tried = [inputs for inputs, _ in probes(Tokens(), given)]
    assert tried[0] is given
    assert all_vary(tried)
    ids, mask = tensors_in(tried[1])
    assert not mask.any()
    assert (ids != next(tensors_in(given))).all()


def test_a_model_for_one_row_alone_is_warned_about():
    class Single(nn.Linear):
        def forward(self, x):
            if len(x) != 1:
                raise ValueError("one row")
            return super().forward(x)

    x = torch.zeros(1, 4)
    with pytest.warns(UserWarning, match="Single runs on one row alone, and so will its file"):
        assert two_rows(Single(4, 2), x) is x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_rows(nn.Linear(4, 2), x)


def test_tensors_are_found_in_objects_with_slots():
    @dataclass(slots=True)
    class Out:
        logits: torch.Tensor
        parts: list[torch.Tensor]

    one, two = torch.ones(1), torch.ones(2)
    assert [len(t) for t in tensors_in((two, Out(one, [two])))] == [2, 1, 2]


def test_probes_have_holes_as_padding_makes_them():
    found = [inputs for inputs, _ in probes(nn.Identity(), torch.full((4, 6), 7))]
    assert sum(bool((some == 0).any() and (some == 7).any()) for some in found) == 2
    found = [inputs for inputs, _ in probes(nn.Identity(), torch.ones(4, 6, 3))]
    assert sum(bool((some == 0).all(-1).any()) for some in found) == 2


def test_an_output_of_other_sizes_for_other_rows_is_compared():
    runs = [[torch.ones(n, n)] for n in (2, 3)]
    assert not difference([torch.ones(3, 3)], [torch.ones(3, 3)], spreads(runs), 1e-4)
    assert difference([torch.ones(3, 3) + 0.1], [torch.ones(3, 3)], spreads(runs), 1e-4)
