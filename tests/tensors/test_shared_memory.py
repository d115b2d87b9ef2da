from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_autoprune.tensors.shared_memory import covers, find_overlaps, shares_entries

storage = torch.zeros(4, 6)


def view(rows: tuple[int, int], columns: tuple[int, int], transposed: bool) -> torch.Tensor:
    part = storage[slice(*rows), slice(*columns, 2)]
    return part.t() if transposed else part


views = st.builds(
    view,
    st.tuples(st.integers(0, 1), st.integers(2, 4)),
    st.tuples(st.integers(0, 2), st.integers(3, 6)),
    st.booleans(),
)


def entries(view: torch.Tensor) -> set[int]:
    """Return the places of a view's entries in the storage, found by writing to them."""
    storage.zero_()
    view.fill_(1)
    found = set(storage.flatten().nonzero().flatten().tolist())
    storage.zero_()
    return found


@given(views, views)
def test_views_share_and_cover_the_entries_that_a_write_changes(a, b):
    assert shares_entries(a, b) is bool(entries(a) & entries(b))
    assert covers(a, b) is (entries(b) <= entries(a))


def test_overlaps_are_found_among_many_tensors():
    matrix = torch.zeros(8, 8)
    tensors = {"alone": torch.zeros(3), "row": matrix[1], "all": matrix.t(), "copy": matrix.clone(), "last": matrix[7]}
    assert find_overlaps(tensors) == [["row", "all", "last"]]
    assert find_overlaps({"first": matrix[:4], "second": matrix[4:]}) == []


def test_tensors_without_memory_share_none():
    meta, empty = torch.zeros(3, device="meta"), torch.zeros(0)
    assert find_overlaps({"meta": meta, "again": meta, "empty": empty, "same": empty}) == []
    assert not shares_entries(meta, meta)
    assert not covers(empty, empty)


def test_a_parameter_of_a_view_shares_the_memory():
    weight = nn.Parameter(torch.zeros(2, 3))
    assert covers(nn.Parameter(weight.t()), weight)


def test_tensors_of_other_types_are_not_the_same_entries():
    matrix = torch.zeros(4)
    assert not shares_entries(matrix, matrix.view(torch.int16))
