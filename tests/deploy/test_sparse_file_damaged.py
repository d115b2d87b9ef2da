"""Files that are forged, truncated, damaged or not from `save_sparse` are refused."""

from __future__ import annotations

import json
import random
import struct
import zlib

import pytest
import torch
from helpers import sparse
from safetensors.torch import save_file
from torch import nn

from lightning_autoprune import AutoPruneError
from lightning_autoprune.deploy.sparse_file import load_sparse, load_sparse_into, save_sparse, sparse_metadata
from lightning_autoprune.deploy.sparse_format import compute_checksum


def test_files_of_other_formats_are_refused(path):
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(AutoPruneError, match="'lightning_autoprune' is not in its metadata, so it was not written by"):
        load_sparse(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(AutoPruneError, match=r"is not a valid sparse file: .* Write it again with `save_sparse`"):
        load_sparse(path)
    path.write_bytes(b"")
    with pytest.raises(AutoPruneError, match="is not a valid sparse file"):
        load_sparse(path)


def forged(path, change, **content):
    """Write a file with a changed layout and a valid checksum."""
    layout = {
        "format": 1,
        "version": "9",
        "tensors": {"a": {"shape": [3], "dtype": "float32", "kept": 3}},
        "metrics": {},
    }
    values = torch.frombuffer(bytearray(zlib.compress(bytes(12))), dtype=torch.uint8)
    content = {"values": values, "masks": torch.zeros(0, dtype=torch.uint8)} | content
    change(layout)
    layout["crc32"] = compute_checksum(layout, content)
    save_file(content, path, {"lightning_autoprune": json.dumps(layout)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: layout.update(format=2), "has the format 2, and this version of lightning-autoprune reads 1"),
        (lambda layout: layout["tensors"]["a"].update(kept=4), "does not hold 4 values of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(kept=2), "does not hold 2 values of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(bits=3, mask=1), "can't be 3 positions of 3"),
        (lambda layout: layout["tensors"]["a"].update(shape=[-3]), "its metadata is invalid: a tensor has the entry"),
        (lambda layout: layout["tensors"]["a"].update(shape=[3.0]), "its metadata is invalid: a tensor has the entry"),
        (
            lambda layout: layout["tensors"]["a"].update(shape=[2**47] * 65),
            "a tensor has 65 dimensions; at most 64 are allowed",
        ),
        (
            lambda layout: layout["tensors"]["a"].update(shape=[2**24] * 2, bits=0),
            r"a tensor has the shape \(16777216, 16777216\); it must have fewer than 2\*\*48 entries",
        ),
        (lambda layout: layout["tensors"]["a"].update(zeros=4), "does not hold 4 zeros of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(zeros=1, bits=0), "does not hold 1 zeros of 'a'"),
        (lambda layout: layout["tensors"]["a"].update(shape="abc"), "its metadata is invalid"),
        (
            lambda layout: layout["tensors"]["a"].update(dtype="object"),
            "its metadata is invalid: a tensor has the entry",
        ),
        (lambda layout: layout["tensors"]["a"].update(other=1), "its metadata is invalid: .*unexpected keyword"),
        (lambda layout: layout["tensors"]["a"].update(same_as="b", kept=0), "is not a valid sparse file: "),
        (lambda layout: layout["tensors"].update(a=7), "its metadata is invalid"),
        (
            lambda layout: layout["tensors"].update(b={"shape": [4], "dtype": "float32", "same_as": "a"}),
            "'b' can't be the same as 'a'",
        ),
        (
            lambda layout: layout["tensors"].update(b={"shape": [3], "dtype": "float32", "kept": 3, "same_as": "a"}),
            "does not hold 3 values of 'b'",
        ),
        (lambda layout: layout["tensors"]["a"].update(shape=[2**47, 2**47, 0], kept=0), "is not a valid sparse file"),
        (lambda layout: layout.update(tensors=[]), "its metadata is invalid"),
        (lambda layout: layout["tensors"].clear(), "it does not hold 0 bytes of values"),
        (lambda layout: layout.pop("metrics"), "'metrics' is not in its metadata"),
    ],
)
def test_a_forged_layout_is_refused(change, message, path):
    forged(path, change)
    with pytest.raises(AutoPruneError, match=message):
        load_sparse(path)


@pytest.mark.parametrize("same_as", [["a"], 7])
def test_metadata_that_ties_a_tensor_to_something_other_than_a_name_is_refused(same_as, path):
    forged(path, lambda layout: layout["tensors"]["a"].update(same_as=same_as, kept=0))
    with pytest.raises(AutoPruneError, match="its metadata is invalid"):
        sparse_metadata(path)


@pytest.mark.parametrize("read", [load_sparse, sparse_metadata])
def test_a_shape_of_very_many_huge_dimensions_is_refused_before_they_are_multiplied(read, path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[2**47] * 100_000))
    with pytest.raises(AutoPruneError, match="a tensor has 100000 dimensions; at most 64 are allowed"):
        read(path)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"not zlib", "Error -3 while decompressing"),
        (zlib.compress(bytes(11)), "it does not hold 12 bytes of values"),
        (zlib.compress(bytes(10**8)), "it does not hold 12 bytes of values"),  # a decompression bomb
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


def test_the_sparsity_of_an_empty_tensor_can_be_read(path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[0], kept=0, bits=0))
    assert sparse_metadata(path)["sparsity"] == {"a": 1.0}


def test_a_file_that_claims_to_be_huge_is_refused_before_anything_is_allocated(path):
    forged(path, lambda layout: layout["tensors"]["a"].update(shape=[2**40], kept=3, bits=0, mask=0))
    with pytest.raises(AutoPruneError, match="would expand to 4398046511104, more than `max_expansion=1000` allows"):
        load_sparse(path)
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(3))
    with pytest.raises(AutoPruneError, match=r"'a' has shape \(1099511627776,\) in the file and \(3,\) in the model"):
        load_sparse_into(model, path)


def mutate(data, generator):
    """Make one to three changes: flip a bit, remove, repeat or replace bytes, truncate, or change the header length."""
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


def test_ten_thousand_damaged_files_are_refused_or_loaded_unchanged(path):
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
