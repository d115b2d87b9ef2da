from __future__ import annotations

import json
import os
import random
import struct
import time
import zlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_autoprune import AutoPruneError
from lightning_autoprune.sparse_file import load_sparse, load_sparse_into, save_sparse, sparse_metadata

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64]


def sparse(*shape, density=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("density", [0.0, 0.003, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [*FLOATS, *SMALL, *WHOLE], ids=str)
def test_every_dtype_comes_back_exactly(dtype, density, path):
    values = (100 * sparse(40, 30, density=density)).abs().to(dtype)
    save_sparse({"a": values}, path)
    back = load_sparse(path)["a"]
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))


def test_shapes_names_and_strides_of_all_kinds_come_back(path):
    state = {
        "": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "ä/b c.weight": sparse(3, 4, 5),
        "transposed": sparse(20, 30).T,
        "strided": sparse(64, 64)[::2, ::3],
        "zeros": torch.zeros(1000),
        "count": torch.tensor(0),
    }
    save_sparse(state, path)
    back = load_sparse(path)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_special_values_keep_their_bits_and_negative_zeros_are_zeros(path):
    values = torch.tensor([float("nan"), float("-inf"), 1e-45, -1e-45, 0.0, -0.0] + [0.0] * 100)
    save_sparse({"a": values, "zeros": torch.full((1000,), -0.0)}, path)
    back = load_sparse(path)
    assert same_bits(back["a"][:5], values[:5])
    assert same_bits(back["a"][5:], torch.zeros(101))
    assert same_bits(back["zeros"], torch.zeros(1000))
    assert os.path.getsize(path) < 700


def test_denormals_keep_their_bits_where_they_are_flushed(path):
    halves = {dtype: torch.finfo(dtype).smallest_normal / 2 for dtype in FLOATS}
    state = {str(dtype): torch.tensor([x, -x] + [0.0, -0.0] * 50, dtype=dtype) for dtype, x in halves.items()}
    state["complex imaginary"] = torch.complex(torch.zeros(102), state["torch.float32"])
    state["integers"] = torch.tensor([-(2**63)] + [0] * 100)
    assert all(tensor.count_nonzero() for tensor in state.values())
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        save_sparse(state, path)
        back = load_sparse(path)
    finally:
        torch.set_flush_denormal(False)
    for name, tensor in state.items():
        assert torch.equal(back[name].view(torch.uint8), (tensor + 0).view(torch.uint8))  # -0.0 + 0 is 0.0


def test_only_kept_values_take_room(path):
    sizes = []
    for density in (0.01, 0.02):
        weight = sparse(1000, 1000, density=density)
        save_sparse({"a": weight}, path)
        sizes.append(os.path.getsize(path))
        assert sizes[-1] < 5.3 * int(weight.count_nonzero()) + 600  # 4 bytes a value, its place in less than 11 bits
    assert sizes[1] > 1.8 * sizes[0]


def test_tied_weights_are_stored_once_and_come_back_tied(path):
    model = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    save_sparse(model, path)
    single = os.path.getsize(path)
    model[1].weight = model[0].weight
    save_sparse(model, path)
    assert os.path.getsize(path) < 0.6 * single
    back = load_sparse(path)
    assert back["1.weight"] is back["0.weight"]
    assert torch.equal(back["0.weight"], model[0].weight)
    load_sparse_into(nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False)), path)


def test_views_of_one_storage_that_differ_are_stored_each(path):
    whole = sparse(4, 50, density=0.5)
    state = {"whole": whole, "row": whole[0], "column": whole[:, 0], "flat": whole.view(-1)}
    save_sparse(state, path)
    assert all(torch.equal(value, state[name]) for name, value in load_sparse(path).items())


def test_a_model_is_read_into_in_place_whatever_its_dtype(path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[3].weight.data.copy_(sparse(2, 16, density=0.2))
    save_sparse(model, path)
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)).double()
    weight = other[3].weight
    load_sparse_into(other, path)
    assert other[3].weight is weight
    assert all(
        torch.equal(value.double(), other.state_dict()[name].double()) for name, value in load_sparse(path).items()
    )


def test_another_architecture_is_refused_with_every_key_and_left_as_it_was(path):
    save_sparse(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), path)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AutoPruneError) as error:
        load_sparse_into(model, path)
    for part in (
        "is of another architecture than Sequential: '1.weight' is missing in the file; '1.bias' is missing in the",
        "'2.weight' is not in the model",
        "Build the model that was saved",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(AutoPruneError, match=r"'0.weight' has shape \(3, 4\) in the file and \(4, 3\) in the model"):
        load_sparse_into(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(3, 2)), path)


def test_metadata_say_version_sparsity_and_metrics(path):
    import lightning_autoprune

    weight = torch.zeros(10, 10)
    weight[0, :5] = 1
    save_sparse({"a": weight, "b": torch.ones(3)}, path, metrics={"val_error": 0.25, "step": 7})
    assert sparse_metadata(path) == {
        "version": lightning_autoprune.__version__,
        "sparsity": {"a": 0.95},
        "metrics": {"val_error": 0.25, "step": 7.0},
    }


def test_metadata_say_the_sparsity_of_tied_tensors_and_of_those_that_are_stored_whole(path):
    weight, codes = torch.zeros(10, 10), torch.arange(1, 101, dtype=torch.int8)
    weight[0], codes[:3] = 1, 0
    save_sparse({"a": weight, "": codes, "tied": weight, "tied codes": codes, "dense": torch.ones(3)}, path)
    assert sparse_metadata(path)["sparsity"] == pytest.approx({"a": 0.9, "": 0.03, "tied": 0.9, "tied codes": 0.03})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "'a' is a int, not a tensor: leave it out and keep it elsewhere"),
        (torch.ones(2, 2).to_sparse(), "'a' is of layout torch.sparse_coo, dtype torch.float32; only dense tensors"),
        (torch.ones(2, device="meta"), "'a' is on the meta device; only dense tensors with values"),
        (torch.ones([1] * 65), "'a' has 65 dimensions; at most 64 can be stored: reshape it first"),
        (nn.UninitializedParameter(), "'a' is lazy and has no shape yet: run one batch through the model first"),
    ],
)
def test_what_is_no_dense_tensor_is_refused_by_name(value, message, path):
    with pytest.raises(AutoPruneError, match=message):
        save_sparse({"a": value}, path)
    assert not path.exists()


def test_a_lazy_model_is_neither_written_nor_read_into(path):
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    message = "'1.weight' is lazy and has no shape yet: run one batch through the model first"
    with pytest.raises(AutoPruneError, match=message):
        save_sparse(model, path)
    assert not path.exists()
    save_sparse(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), path)
    with pytest.raises(AutoPruneError, match=message):
        load_sparse_into(model, path)


def test_a_failed_save_leaves_the_old_file_and_no_other(path, tmp_path, monkeypatch):
    save_sparse({"a": torch.ones(3)}, path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_sparse({"a": torch.zeros(3)}, path)
    assert torch.equal(load_sparse(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_that_is_not_there_is_an_oserror_with_its_name(path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_sparse(path)


def test_other_files_are_refused(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(AutoPruneError, match="'lightning_autoprune' is not in its metadata, so `save_sparse` has not"):
        load_sparse(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(AutoPruneError, match=r"is not a whole sparse file: .* Make it anew with `save_sparse`"):
        load_sparse(path)
    path.write_bytes(b"")
    with pytest.raises(AutoPruneError, match="is not a whole sparse file"):
        load_sparse(path)


def forged(path, change, **content):
    """Writes a file with a valid checksum whose layout is changed."""
    from lightning_autoprune import sparse_file

    layout = {
        "format": 1,
        "version": "9",
        "tensors": {"a": {"shape": [3], "dtype": "float32", "kept": 3}},
        "metrics": {},
    }
    values = torch.frombuffer(bytearray(zlib.compress(bytes(12))), dtype=torch.uint8)
    content = {"values": values, "masks": torch.zeros(0, dtype=torch.uint8)} | content
    change(layout)
    layout["crc32"] = sparse_file._checksum(layout, content)
    save_file(content, path, {"lightning_autoprune": json.dumps(layout)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: layout.update(format=2), "has the format 2, and this version of lightning-autoprune reads 1"),
        (lambda layout: layout["tensors"]["a"].update(kept=4), "does not hold 4 values of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(kept=2), "does not hold 2 values of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(bits=3, mask=1), "can't be 3 positions of 3"),
        (lambda layout: layout["tensors"]["a"].update(shape=[-3]), "its metadata make no sense: a tensor with"),
        (lambda layout: layout["tensors"]["a"].update(shape=[3.0]), "its metadata make no sense: a tensor with"),
        (
            lambda layout: layout["tensors"]["a"].update(shape=[2**47] * 65),
            "a tensor of 65 dimensions, and 64 are allowed",
        ),
        (
            lambda layout: layout["tensors"]["a"].update(shape=[2**24] * 2, bits=0),
            r"a tensor of shape \(16777216, 16777216\), and fewer than 2\*\*48 entries are allowed",
        ),
        (lambda layout: layout["tensors"]["a"].update(zeros=4), "does not hold 4 zeros of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(zeros=1, bits=0), "does not hold 1 zeros of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(shape="abc"), "its metadata make no sense"),
        (lambda layout: layout["tensors"]["a"].update(dtype="object"), "its metadata make no sense: a tensor with"),
        (lambda layout: layout["tensors"]["a"].update(other=1), "its metadata make no sense: .*unexpected keyword"),
        (lambda layout: layout["tensors"]["a"].update(same_as="b", kept=0), "is not a whole sparse file: "),
        (lambda layout: layout["tensors"].update(a=7), "its metadata make no sense"),
        (
            lambda layout: layout["tensors"].update(b={"shape": [4], "dtype": "float32", "same_as": "a"}),
            "'b' is not what 'a' is",
        ),
        (
            lambda layout: layout["tensors"].update(b={"shape": [3], "dtype": "float32", "kept": 3, "same_as": "a"}),
            "does not hold 3 values of 'b'",
        ),
        (lambda layout: layout["tensors"]["a"].update(shape=[2**47, 2**47, 0], kept=0), "is not a whole sparse file"),
        (lambda layout: layout.update(tensors=[]), "its metadata make no sense"),
        (lambda layout: layout["tensors"].clear(), "it does not hold 0 bytes of values"),
        (lambda layout: layout.pop("metrics"), "'metrics' is not in its metadata"),
    ],
)
def test_a_forged_layout_is_refused(change, message, path):
    forged(path, change)
    with pytest.raises(AutoPruneError, match=message):
        load_sparse(path)


@pytest.mark.parametrize("same_as", [["a"], 7])
def test_metadata_that_tie_a_tensor_to_no_name_are_refused(same_as, path):
    forged(path, lambda layout: layout["tensors"]["a"].update(same_as=same_as, kept=0))
    with pytest.raises(AutoPruneError, match="its metadata make no sense"):
        sparse_metadata(path)


@pytest.mark.parametrize("read", [load_sparse, sparse_metadata])
def test_a_shape_of_very_many_huge_dimensions_is_refused_at_once(read, path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[2**47] * 100_000))
    start = time.perf_counter()
    with pytest.raises(AutoPruneError, match="a tensor of 100000 dimensions, and 64 are allowed"):
        read(path)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"not zlib", "Error -3 while decompressing"),
        (zlib.compress(bytes(11)), "it does not hold 12 bytes of values"),
        (zlib.compress(bytes(10**8)), "it does not hold 12 bytes of values"),  # a bomb
        (zlib.compress(bytes(12)) + b"more", "it does not hold 12 bytes of values"),
        (zlib.compress(bytes(12))[:-1], "it does not hold 12 bytes of values"),
    ],
)
def test_forged_values_are_refused(stream, message, path):
    forged(path, lambda layout: None, values=torch.frombuffer(bytearray(stream), dtype=torch.uint8))
    with pytest.raises(AutoPruneError, match=message):
        load_sparse(path)


@pytest.mark.parametrize("masks", [torch.tensor(1, dtype=torch.uint8), torch.zeros(2), torch.zeros(1, 1).byte()])
def test_forged_masks_are_refused(masks, path):
    forged(path, lambda layout: None, masks=masks)
    with pytest.raises(AutoPruneError, match="its content is not bytes"):
        load_sparse(path)


def test_metadata_of_an_empty_tensor_can_be_read(path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[0], kept=0, bits=0))
    assert sparse_metadata(path)["sparsity"] == {"a": 1.0}


def test_conjugate_views_keep_their_values(path):
    x = torch.randn(20, dtype=torch.complex64)
    save_sparse({"a": x, "b": x.conj(), "c": x.conj().imag}, path)
    back = load_sparse(path)
    assert torch.equal(back["b"], x.conj().resolve_conj())
    assert torch.equal(back["c"], -x.imag)


@pytest.mark.parametrize("size", [1000, 100_000])  # memory of small and of large tensors is used again
@pytest.mark.parametrize("lazy", [torch.conj, lambda x: x.conj().imag], ids=["conjugate", "negative"])
def test_lazily_changed_tensors_of_one_shape_are_not_taken_for_tied(lazy, size, path):
    state = {str(i): lazy(torch.full((size,), complex(i, i + 1))) for i in range(10)}
    save_sparse({**state, "tied": state["3"]}, path)
    back = load_sparse(path)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert back["tied"] is back["3"]


@pytest.mark.parametrize("size", [1000, 100_000])
def test_tensors_that_are_made_as_they_are_asked_for_are_not_taken_for_tied(size, path):
    class Made(dict):
        def items(self):
            return ((name, torch.full((size,), value)) for name, value in super().items())

    save_sparse(Made({str(i): float(i) for i in range(10)}), path)
    back = load_sparse(path)
    assert [value.unique().tolist() for value in back.values()] == [[i] for i in range(10)]


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_sparse({"a": torch.ones(2)}, tmp_path / "no" / "a.safetensors")


def test_a_file_that_claims_to_be_huge_is_refused_before_anything_is_allocated(path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[2**40], kept=3, bits=0, mask=0))
    with pytest.raises(AutoPruneError, match="would grow to 4398046511104, more than `max_expansion=1000` allows"):
        load_sparse(path)
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3))
    with pytest.raises(AutoPruneError, match=r"'a' has shape \(1099511627776,\) in the file and \(3,\) in the model"):
        load_sparse_into(model, path)


def test_an_own_file_of_zeros_only_can_be_read(path):
    save_sparse({"a": torch.zeros(5_000_000)}, path)
    assert load_sparse(path)["a"].count_nonzero() == 0


def mutate(data, generator):
    """One to three changes: bits flipped, bytes cut out, doubled or put in, the length in the header changed."""
    data = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        kind, at = generator.randrange(6), generator.randrange(len(data))
        # half of the changes are in the header, which is where a reader can go wrong
        at = at if generator.random() < 0.5 else generator.randrange(min(len(data), 700))
        if kind == 0:
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del data[at : at + generator.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + generator.randint(1, 40)]
        elif kind == 3:
            data[at] = generator.choice(b'0123456789"{}[],:-x')
        elif kind == 4:
            del data[at:]
        else:
            data[:8] = struct.pack("<Q", generator.choice([0, 1, 8, len(data), 2**31, 2**63, 2**64 - 1]))
        if not data:
            break
    return bytes(data)


def test_ten_thousand_damaged_files_are_refused_or_read_as_they_were(path):
    state = {"a": sparse(20, 30), "b": torch.arange(5), "c": sparse(7, density=0.9).half()}
    save_sparse(state, path, metrics={"error": 0.5})
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(10_000):
        path.write_bytes(mutate(whole, generator))
        try:
            back = load_sparse(path)
        except AutoPruneError:
            refused += 1
        else:
            assert list(back) == list(state)
            assert all(torch.equal(back[name], value) for name, value in state.items())
    assert refused > 9500


def test_a_number_after_values_of_another_size_comes_back():
    """One entry needs no reordering of its bytes, and they may begin anywhere."""
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": torch.tensor(7), "c": torch.tensor([0.5]), "d": torch.ones(5)}
    save_sparse(tensors, "f.safetensors")
    back = load_sparse("f.safetensors")
    assert all(same_bits(back[name], tensor) for name, tensor in tensors.items())
