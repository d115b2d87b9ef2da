"""Examples are repeated to other batch sizes and varied, whatever containers hold their tensors."""

from __future__ import annotations

import warnings
from collections import UserDict

import pytest
import torch
from torch import nn

from lightning_autoprune.model.example_inputs import (
    every_value_varies,
    repeat_single_sample,
    run_batch_sizes,
    run_variations,
)
from lightning_autoprune.model.forward import tensors_in


class Tokens(nn.Module):
    """Averages over the tokens that a mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        return (self.layer(self.embed(ids)) * mask[..., None]).mean(1)


def example(samples: int, kind: type) -> object:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(samples)])
    mask = torch.ones(samples, 3, dtype=torch.bool)
    return (ids, mask) if kind is tuple else kind({"ids": ids, "mask": mask})


KINDS = pytest.mark.parametrize("kind", [tuple, dict, UserDict])  # tokenizers return a UserDict


@KINDS
def test_only_an_example_of_a_single_sample_is_repeated(kind):
    model, several = Tokens(), example(3, kind)
    assert [len(tensor) for tensor in tensors_in(repeat_single_sample(model, example(1, kind)))] == [2, 2]
    assert repeat_single_sample(model, several) is several


@KINDS
def test_a_model_is_run_with_other_batch_sizes(kind):
    runs = run_batch_sizes(Tokens(), example(3, kind))
    assert [[len(tensor) for tensor in tensors_in(inputs)] for inputs, _ in runs] == [[n, n] for n in (1, 2, 3, 7)]
    assert [len(output) for _, (output,) in runs] == [1, 2, 3, 7]


@KINDS
def test_every_value_of_an_example_is_varied(kind):
    given = example(4, kind)
    inputs = [run.inputs for run in run_variations(Tokens(), given)]
    assert inputs[0] is given
    assert every_value_varies(inputs)
    ids, mask = tensors_in(inputs[1])
    assert not mask.any()
    assert (ids != next(tensors_in(given))).all()


def test_a_model_that_runs_only_on_one_sample_is_warned_about():
    class Single(nn.Linear):
        def forward(self, x):
            if len(x) != 1:
                raise ValueError("one sample")
            return super().forward(x)

    x = torch.zeros(1, 4)
    with pytest.warns(UserWarning, match="Single runs only on a batch of one sample, and so will the exported file"):
        assert repeat_single_sample(Single(4, 2), x) is x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        repeat_single_sample(nn.Linear(4, 2), x)


def test_two_variations_have_zeros_as_padding_has_them():
    variations = [run.inputs for run in run_variations(nn.Identity(), torch.full((4, 6), 7))]
    assert sum(bool((x == 0).any() and (x == 7).any()) for x in variations) == 2
    variations = [run.inputs for run in run_variations(nn.Identity(), torch.ones(4, 6, 3))]
    assert sum(bool((x == 0).all(-1).any()) for x in variations) == 2
