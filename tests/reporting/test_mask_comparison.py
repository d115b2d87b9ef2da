"""Two masks are compared weight by weight: kept in both, in the first, in the second, or in neither."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune import AutoPruneError
from lightning_autoprune.reporting.mask_comparison import compare_masks, format_comparison_table

masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1)


@given(masks)
def test_every_weight_is_counted_once(pairs):
    a, b = (torch.tensor([float(pair[i]) for pair in pairs]) for i in (0, 1))
    row, total = compare_masks({"layer": a}, {"layer": -2 * b})
    assert row.both == sum(x and y for x, y in pairs)
    assert row.pruned == sum(x and not y for x, y in pairs)
    assert row.revived == sum(y and not x for x, y in pairs)
    assert (row.weights, row.kept, row.kept_after) == (len(pairs), int(a.sum()), int(b.sum()))
    union = sum(x or y for x, y in pairs)
    assert row.overlap == (row.both / union if union else 1.0)
    assert total.as_dict() == {**row.as_dict(), "name": "all"}


def test_layers_without_a_match_are_left_out_of_the_rows_and_the_sum():
    a = {"same": torch.eye(3), "shape": torch.eye(2), "gone": torch.eye(2)}
    b = {"same": torch.ones(3, 3), "shape": torch.eye(4), "new": torch.eye(2)}
    rows = compare_masks(a, b)
    assert [row.name for row in rows] == ["same", "all"]
    assert (rows[1].kept, rows[1].kept_after) == (3, 9)
    head, cells = format_comparison_table(rows)
    assert dict(zip(head, cells[0], strict=True)) == {
        "layer": "same",
        "weights": "9",
        "kept in A": "3",
        "kept in B": "9",
        "in both": "3",
        "pruned": "0",
        "revived": "6",
        "overlap": "33.33%",
    }


def test_models_without_a_common_layer_are_refused_and_their_layers_are_listed():
    with pytest.raises(
        AutoPruneError,
        match=r"No layer has the same name and shape in both.*first has a \(2, 2\)\. The second has a \(3, 3\)",
    ):
        compare_masks({"a": torch.eye(2)}, {"a": torch.eye(3)})
