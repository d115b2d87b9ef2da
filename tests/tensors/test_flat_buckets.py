"""Small tensors as one flat tensor, and large ones in pieces: no entry is lost, and the method's results stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.tensors import flat_buckets
from lightning_autoprune.tensors.flat_buckets import Bucket, fill_buckets, split_pieces


def tensors_in_many_memory_orders() -> list[torch.Tensor]:
    """Return tensors that are contiguous, transposed, in channels-last order, and with gaps."""
    torch.manual_seed(0)
    return [
        torch.randn(3, 5),
        torch.randn(4, 6).T,
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(5, 9)[:, ::2],
        torch.randn(7),
    ]


@pytest.mark.parametrize("numbers", [[0], [1], [2], [3], [0, 1, 2, 3, 4], [4, 2]])
def test_writing_a_flat_tensor_back_changes_the_tensors_of_the_bucket_alone(numbers):
    tensors = tensors_in_many_memory_orders()
    before = [t.clone() for t in tensors]
    bucket = Bucket(numbers, tensors)
    flat = bucket.flatten(tensors)
    assert flat.shape == (bucket.total,)
    bucket.write(flat.mul_(2), tensors)
    for i, (tensor, old) in enumerate(zip(tensors, before, strict=True)):
        assert torch.equal(tensor, old * 2 if i in numbers else old)


@pytest.mark.parametrize("numbers", [[0], [1], [2], [3], [0, 1, 2, 3, 4]])
def test_views_share_the_flat_tensors_memory_in_the_shapes_of_the_tensors(numbers):
    tensors = tensors_in_many_memory_orders()
    bucket = Bucket(numbers, tensors)
    flat = bucket.flatten(tensors)
    for view, i in zip(bucket.views(flat), numbers, strict=True):
        assert torch.equal(view, tensors[i])
    bucket.views(flat)[0].zero_()
    assert (flat[: bucket.sizes[0]] == 0).all()


def test_flattening_copies_a_tensor_only_if_its_memory_order_is_another():
    tensors = tensors_in_many_memory_orders()
    bucket = Bucket([2], tensors)
    assert bucket.flatten(tensors).data_ptr() == tensors[2].data_ptr()
    reordered = [*tensors[:2], tensors[2].contiguous(), *tensors[3:]]  # as a gradient may be
    assert torch.equal(bucket.flatten(reordered), bucket.flatten(tensors))


def test_sums_are_taken_over_each_tensor():
    tensors = tensors_in_many_memory_orders()
    bucket = Bucket([0, 3, 4], tensors)
    bits = torch.randint(-1, 1, (bucket.total,), dtype=torch.int32)
    assert bucket.sums(bits).tolist() == [int(view.sum()) for view in bucket.views(bits)]


@given(st.lists(st.sampled_from([1, 50, 9_000, 16_384, 16_385, 200_000]), min_size=1, max_size=30), st.booleans())
def test_every_tensor_is_in_one_bucket_with_tensors_of_its_dtype(sizes, mixed):
    dtypes = [torch.float32, torch.bfloat16]
    tensors = [torch.empty(n, dtype=dtypes[i % 2 if mixed else 0], device="meta") for i, n in enumerate(sizes)]
    buckets = fill_buckets(tensors, sizes)
    assert sorted(i for bucket in buckets for i in bucket.numbers) == list(range(len(sizes)))
    for bucket in buckets:
        assert len({tensors[i].dtype for i in bucket.numbers}) == 1
        assert len(bucket.numbers) == 1 or bucket.total <= 2**16


def test_pieces_make_up_the_whole_tensor():
    x, y = torch.randn(200_000), torch.randn(200_000)
    pieces_of_x, pieces_of_y = zip(*split_pieces(x, y), strict=True)
    assert torch.equal(torch.cat(pieces_of_x), x)
    assert torch.equal(torch.cat(pieces_of_y), y)
    assert [len(piece) for piece in pieces_of_x] == [65536, 65536, 65536, 3392]


@pytest.mark.parametrize("rule", ["adaptive", "autoprune"])
def test_layers_that_share_a_bucket_are_pruned_like_layers_with_one_each(rule, monkeypatch):
    def run() -> AuxiliaryParameters:
        torch.manual_seed(0)
        shapes = [(20, 30), (5, 1, 3, 3), (1000, 200), (40,)]
        weights = {str(i): torch.nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
        weights["1"].data = torch.randn(5, 1, 3, 3).to(memory_format=torch.channels_last)
        aux = AuxiliaryParameters(weights, update_rule=rule, layer_floor=0.2)
        for _ in range(20):
            aux.step([torch.randn_like(w) for w in weights.values()], 0.005, 0.6)
            aux.update_masks()
        return aux

    together = run()
    monkeypatch.setattr(flat_buckets, "_SMALL", 0)
    monkeypatch.setattr(flat_buckets, "_PIECE", 997)
    alone = run()
    assert [len(bucket.numbers) for bucket in together.buckets] == [3, 1]
    assert len(alone.buckets) == 4
    for a, b in zip(together.M, alone.M, strict=True):
        torch.testing.assert_close(a, b)
    assert together.kept == pytest.approx(alone.kept, abs=2)
    assert all(
        floor < kept < total for floor, kept, total in zip(together.floors, together.kept, together.totals, strict=True)
    )
