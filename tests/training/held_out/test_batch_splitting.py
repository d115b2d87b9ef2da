"""Splitting collated batches by sample: which containers hold samples, and which batches are refused."""

from __future__ import annotations

from collections import defaultdict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import default_collate

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.training.held_out.batch_splitting import UnclearSamplesError, part_of_rank, split_batch

Pair = namedtuple("Pair", ["x", "y"])


@given(st.integers(1, 50), st.floats(0.01, 0.99), st.integers(0, 9))
def test_the_two_parts_make_up_the_batch_and_share_no_sample(samples, fraction, seed):
    x = torch.arange(samples)
    rest, held = split_batch((x, x * 2), fraction, seed)
    if held is None:
        assert round(fraction * samples) in (0, samples)
        assert rest[0] is x
        return
    assert len(held[0]) == round(fraction * samples)
    assert sorted(rest[0].tolist() + held[0].tolist()) == x.tolist()
    assert torch.equal(held[1], 2 * held[0])


def test_held_out_samples_change_with_the_step_and_repeat_with_the_seed():
    def held(*seeds):
        return split_batch(torch.arange(100), 0.5, *seeds)[1].tolist()

    assert held(0, 1) == held(0, 1)
    assert held(0, 1) != held(0, 2)


def test_every_kind_of_nesting_is_split_by_sample():
    batch = {
        "pair": Pair(torch.arange(4), torch.arange(4) * 10),
        "list": [torch.arange(4), (torch.arange(4).view(4, 1),)],
        "texts": ["a", "b", "c", "d"],
        "boxes": [torch.zeros(i + 1) for i in range(4)],
        "scale": torch.tensor(2.0),
        "name": "batch",
        "nothing": None,
    }
    rest, held = split_batch(batch, 0.25, 0)
    (row,) = held["pair"].x.tolist()
    assert isinstance(held["pair"], Pair)
    assert held["pair"].y.tolist() == [row * 10]
    assert held["list"][0].tolist() == held["list"][1][0].flatten().tolist() == [row]
    assert held["texts"] == ["abcd"[row]]
    assert [len(box) for box in held["boxes"]] == [row + 1]
    assert (held["scale"], held["name"], held["nothing"]) == (2.0, "batch", None)
    assert len(rest["texts"]) == 3
    assert sorted(rest["texts"] + held["texts"]) == batch["texts"]


def test_texts_of_the_default_collation_stay_with_their_samples():
    batch = default_collate([(torch.tensor(i), "abcd"[i]) for i in range(4)])
    rest, held = split_batch(batch, 0.25, 0)
    assert isinstance(batch[1], tuple)
    assert held[1] == ("abcd"[int(held[0])],)
    assert rest[1] == tuple("abcd"[int(i)] for i in rest[0])


def test_a_tuple_with_one_item_per_sample_is_split_by_item():
    boxes = tuple({"boxes": torch.zeros(i + 1, 4)} for i in range(4))
    rest, held = split_batch((torch.arange(4), boxes), 0.25, 0)
    assert [len(item["boxes"]) for item in held[1]] == [int(held[0]) + 1]
    assert [len(item["boxes"]) for item in rest[1]] == [int(i) + 1 for i in rest[0]]


def test_a_dict_keeps_its_type():
    batch = defaultdict(list, x=torch.arange(4))
    _, held = split_batch(batch, 0.25, 0)
    assert (type(held), held.default_factory, len(held["x"]), len(batch["x"])) == (defaultdict, list, 1, 4)


def test_a_list_with_as_many_columns_as_samples_is_split_by_rows():
    rest, held = split_batch([torch.arange(3), torch.arange(3) * 10, ["a", "b", "c"]], 1 / 3, 0)
    (row,) = held[0].tolist()
    assert held == [held[0], held[1], ["abc"[row]]]
    assert held[1].tolist() == [10 * row]
    assert len(rest[2]) == 2


SEQUENCES = [torch.arange(10.0)[:, None] + 100 * i for i in range(8)]
GROWING = [torch.arange(1.0 + i)[:, None] + 100 * i for i in range(8)]


@pytest.mark.parametrize(
    "make", [tuple, list, lambda lists: Pair(*lists), lambda lists: dict(zip("xy", lists, strict=True))]
)
@pytest.mark.parametrize(
    ("items", "labels"),
    [
        (SEQUENCES, list(range(8))),
        (SEQUENCES, [torch.tensor(i) for i in range(8)]),
        (GROWING, [{"boxes": torch.zeros(1 + i, 4), "of": i} for i in range(8)]),
        ([{"x": x} for x in SEQUENCES], tuple(range(8))),
    ],
)
def test_lists_with_one_item_per_sample_are_split_by_item(make, items, labels):
    parts = split_batch(make([items, labels]), 0.25, 0)
    values = [list(part.values()) if isinstance(part, dict) else list(part) for part in parts]
    assert [[len(items) for items in part] for part in values] == [[6, 6], [2, 2]]
    seen = []
    for kept_items, kept_labels in values:
        for item, label in zip(kept_items, kept_labels, strict=True):
            i = int(label["of"] if isinstance(label, dict) else label)
            assert item is items[i]
            seen.append(i)
    assert sorted(seen) == list(range(8))


def test_lists_of_columns_of_the_default_collation_are_split_by_rows():
    batch = default_collate([([torch.tensor(i), torch.tensor(10 * i)], ["a", "b"]) for i in range(4)])
    rest, held = split_batch(batch, 0.25, 0)
    assert [[len(column) for column in columns] for columns in held] == [[1, 1], [1, 1]]
    assert [[len(column) for column in columns] for columns in rest] == [[3, 3], [3, 3]]


def test_a_sparse_tensor_is_split_by_rows():
    rest, held = split_batch((torch.eye(4).to_sparse(), torch.arange(4)), 0.25, 0)
    for x, y in (rest, held):
        assert torch.equal(x.to_dense(), torch.eye(4)[y])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (torch.eye(4).to_sparse_csr(), torch.zeros(4)),
            "of the layout torch.sparse_csr, whose samples can't be split: pass",
        ),
        (
            (SEQUENCES, SEQUENCES),
            "2 lists of 8 items with tensors of 10 rows, and it is unclear whether an item is a sample or a column",
        ),
        ("text", "A batch of type str has no tensor with samples to hold out"),
        (
            (torch.zeros(4), torch.zeros(3, 2)),
            r"tensors of 4 and of 3 rows \(shape \(3, 2\)\), so its samples can't",
        ),
        ((torch.zeros(4), object()), "A batch holds a object, whose samples can't be split"),
    ],
)
def test_a_batch_that_can_not_be_split_is_refused(batch, message):
    with pytest.raises(AutoPruneError, match=message):
        split_batch(batch, 0.5, 0)


# Lists of samples


def boxes(*counts: int) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": torch.full((n, 4), float(i))} for i, n in enumerate(counts)]


IMAGES = [torch.full((3, 5, 5), float(i)) for i in range(6)]
GREY = [image[0] if i % 2 else image for i, image in enumerate(IMAGES)]


@pytest.mark.parametrize("make", [list, tuple])
@pytest.mark.parametrize(
    "samples",
    [
        [(x, i) for i, x in enumerate(SEQUENCES)],
        [[x, i + 0.5 * (i % 2)] for i, x in enumerate(SEQUENCES)],
        [(x, torch.tensor(i)) for i, x in enumerate(SEQUENCES)],
        [(x, "text") for x in SEQUENCES],
        [{"x": x, "y": i} for i, x in enumerate(SEQUENCES)],
        [Pair(x, i) for i, x in enumerate(SEQUENCES)],
        [(x, torch.ones(len(x), dtype=torch.long)) for x in GROWING],
        [{"x": x, "y": x[0]} for x in GROWING],
        list(zip(IMAGES, boxes(1, 2, 1, 3, 4, 1), strict=True)),
        list(zip(IMAGES, boxes(1, 2, 1, 3, 4, 1), strict=True))[:2],
        list(zip(GREY, [None, *boxes(1, 2, 1, 3, 4)], strict=True)),
        [(x, {"boxes": torch.ones(3, 4), "image": i}) for i, x in enumerate(IMAGES)],
    ],
)
def test_lists_of_samples_are_split_by_sample(make, samples):
    batch = make(samples)
    rest, held = split_batch(batch, 0.25, 0, min_samples=1)
    assert len(rest) + len(held) == len(batch)
    assert held
    assert type(rest) is type(held) is make
    assert {id(sample) for part in (rest, held) for sample in part} == set(map(id, batch))


def test_several_views_of_the_samples_are_split_alike():
    def view(sign):
        return {"x": sign * torch.arange(4), "texts": ["a", "b", "c", "d"], "boxes": [torch.ones(i) for i in range(4)]}

    for rows in ({"x": torch.arange(4)}, view(1)):
        for held in split_batch([rows, rows], 0.25, 0)[1]:
            assert {key: len(column) for key, column in held.items()} == dict.fromkeys(rows, 1)
    (first, second), _ = split_batch(default_collate([({"x": i}, {"y": i}) for i in range(4)]), 0.25, 0)
    assert torch.equal(first["x"], second["y"])
    scaled = ([{"x": torch.arange(4), "scale": 2.0}, {"x": -torch.arange(4), "scale": 3.0}], torch.arange(4))
    (first, second), row = split_batch(scaled, 0.25, 0)[1]
    assert (first["x"], second["x"], first["scale"], second["scale"]) == (row, -row, 2.0, 3.0)


# Unclear batches


@pytest.mark.parametrize(
    ("clear", "unclear"),
    [
        ((IMAGES, boxes(1, 2, 1, 3, 4, 1)), (IMAGES[:4], boxes(3, 3, 3, 3))),
        (
            list(zip(IMAGES, boxes(1, 2, 1, 3, 4, 1), strict=True)),
            list(zip(IMAGES[:4], boxes(3, 3, 3, 3), strict=True)),
        ),
    ],
)
def test_an_unclear_batch_is_split_like_the_one_before_it(clear, unclear):
    with pytest.raises(UnclearSamplesError, match="it is unclear whether an item is a sample or a column"):
        split_batch(unclear, 0.25, 0)
    layouts = {}
    split_batch(clear, 0.25, 0, layouts=layouts)
    _, held = split_batch(unclear, 0.25, 0, layouts=layouts)
    ((image, target),) = zip(*held, strict=True) if isinstance(held, tuple) else held
    assert image.shape == (3, 5, 5)
    assert target["boxes"].shape == (3, 4)
    assert image[0, 0, 0] == target["boxes"][0, 0]


@pytest.mark.parametrize("order", [1, -1])
def test_a_list_of_dicts_beside_as_many_rows_is_split_by_item(order):
    """Two images, with two boxes each."""
    batch = dict([("x", torch.arange(2.0)), ("labels", boxes(2, 2))][::order])
    for part in split_batch(batch, 0.25, 0, min_samples=2):
        assert torch.equal(part["labels"][0]["boxes"], part["x"].expand(2, 4))
        assert len(part["labels"]) == len(part["x"]) == 1


def test_a_list_as_long_as_the_batch_is_split_like_those_of_earlier_batches():
    def views(rows):
        return torch.arange(rows), [{"x": torch.arange(rows)}, {"x": torch.arange(rows)}]

    def masks(*counts):
        return {"x": torch.arange(float(len(counts))), "masks": [item["boxes"] for item in boxes(*counts)]}

    layouts = {}
    split_batch(views(8), 0.25, 0, layouts=layouts)
    for row, (first, second) in split_batch(views(2), 0.5, 0, layouts=layouts):
        assert first["x"].tolist() == second["x"].tolist() == row.tolist()
    layouts = {}
    split_batch(masks(1, 2, 3), 0.25, 0, min_samples=1, layouts=layouts)
    for part in split_batch(masks(2, 2), 0.5, 0, layouts=layouts):
        assert torch.equal(part["masks"][0], part["x"].expand(2, 4))


def test_the_least_nested_tensor_gives_the_number_of_samples():
    rest, held = split_batch({"labels": boxes(3, 1, 2, 5), "x": torch.arange(4.0)}, 0.25, 0)
    for part in (rest, held):
        assert [item["boxes"][0, 0] for item in part["labels"]] == part["x"].tolist()


def test_lists_of_another_length_than_the_batch_are_columns():
    x, nested = split_batch(default_collate([(i, ((i, i), (i, i))) for i in range(4)]), 0.25, 0)[1]
    assert [[column.tolist() for column in columns] for columns in nested] == [[x.tolist()] * 2] * 2


# The parts of the ranks


@given(samples=st.integers(1, 40), ranks=st.integers(1, 6))
def test_the_parts_of_the_ranks_make_up_the_batch_and_their_weighted_mean_is_its_mean(samples, ranks):
    batch = torch.arange(samples, dtype=torch.float64)
    parts, weights = zip(*(part_of_rank(batch, rank, ranks) for rank in range(ranks)), strict=True)
    assert sum(weights) == pytest.approx(ranks)
    mean = sum(weight * part.mean() for part, weight in zip(parts, weights, strict=True)) / ranks
    assert float(mean) == pytest.approx(float(batch.mean()))
    if samples >= 2 * ranks:
        assert torch.equal(torch.cat(parts).sort().values, batch)
        assert min(len(part) for part in parts) >= 2
    else:
        assert all(torch.equal(part, batch) for part in parts)
