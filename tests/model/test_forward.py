"""Example inputs become arguments of a forward, and tensors are found in whatever it returns."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass

import pytest
import torch

from lightning_autoprune.model.forward import as_arguments, tensors_in


@pytest.mark.parametrize("kind", [tuple, dict, UserDict])  # tokenizers return a UserDict
def test_arguments_are_copies_of_the_example(kind):
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    example = (ids, mask) if kind is tuple else kind({"ids": ids, "mask": mask})
    args, kwargs = as_arguments(example)
    assert (len(args), list(kwargs)) == ((2, []) if kind is tuple else (0, ["ids", "mask"]))
    for tensor in tensors_in((args, kwargs)):
        tensor.zero_()
    assert all(tensor.any() for tensor in tensors_in(example))


def test_tensors_are_found_in_objects_with_slots():
    @dataclass(slots=True)
    class Output:
        logits: torch.Tensor
        parts: list[torch.Tensor]

    one, two = torch.ones(1), torch.ones(2)
    assert [len(t) for t in tensors_in((two, Output(one, [two])))] == [2, 1, 2]
