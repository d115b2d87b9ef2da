"""The format of a sparse file: how tensors are encoded as bytes, and how bytes are checked and decoded."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_autoprune.deploy.gap_coding import decode_mask, encode_mask
from lightning_autoprune.errors import AutoPruneError

__all__ = [
    "FORMAT_VERSION",
    "MAX_DIMENSIONS",
    "METADATA_KEY",
    "SparseFileReader",
    "TensorEntry",
    "compute_checksum",
    "encode_tensor",
    "entry_to_json",
]

METADATA_KEY, FORMAT_VERSION = "lightning_autoprune", 1

MAX_DIMENSIONS = 64

_NUMBER_LIMIT = 2**48  # every number in a file is below this, and so is the number of entries of a tensor

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class TensorEntry:
    """How a tensor is stored. The names of the attributes are keys in the file.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor, without ``torch.``.
        kept: number of entries that are stored.
        bits: number of low bits per gap in the mask's code; None if all entries are stored.
        mask: length of the mask's code, in bytes.
        same_as: name of another tensor that is the same as this one, which has no bytes then.
        zeros: number of zeros among the stored entries; 0 unless all entries are stored.
    """

    shape: tuple[int, ...]
    dtype: str
    kept: int
    bits: int | None = None
    mask: int = 0
    same_as: str | None = None
    zeros: int = 0

    @property
    def size(self) -> int:
        """Number of entries of the tensor, including zeros."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per entry."""
        return _DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in memory, including zeros."""
        return self.size * self.itemsize


def entry_to_json(entry: TensorEntry) -> dict[str, Any]:
    """Return an entry as a JSON object, without the values that are the defaults."""
    defaults = TensorEntry((), "", 0)
    return {key: value for key, value in asdict(entry).items() if value != getattr(defaults, key) or key == "shape"}


def _entry_from_json(stored: Mapping[str, Any]) -> TensorEntry:
    """Return the entry of a JSON object, or raise an error if a value is not allowed."""
    entry = TensorEntry(**{"kept": 0, **stored, "shape": tuple(stored["shape"])})
    if len(entry.shape) > MAX_DIMENSIONS:  # checked first, as the product of very many sizes would take long
        raise ValueError(f"a tensor has {len(entry.shape)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    numbers = [*entry.shape, entry.kept, entry.mask, entry.zeros, *([] if entry.bits is None else [entry.bits])]
    if not all(type(number) is int and 0 <= number < _NUMBER_LIMIT for number in numbers) or entry.dtype not in _DTYPES:
        raise ValueError(f"a tensor has the entry {stored}")
    if not isinstance(entry.same_as, str | None):
        raise ValueError(f"a tensor is the same as {entry.same_as!r}, which is no name")
    if entry.size >= _NUMBER_LIMIT:
        raise ValueError(f"a tensor has the shape {entry.shape}; it must have fewer than 2**48 entries")
    return entry


def compute_checksum(layout: Mapping[str, Any], content: Mapping[str, Tensor]) -> str:
    """Return the CRC-32 of a file's layout (without the checksum) and content, in hexadecimal."""
    crc = zlib.crc32(json.dumps(layout, sort_keys=True).encode())
    for name in sorted(content):
        crc = zlib.crc32(content[name].numpy().data, crc)
    return f"{crc:08x}"


# Encoding


class EncodedTensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
        entry: its layout.
        values: bytes of the stored entries: the lowest bytes of all entries first, the highest last.
        mask_code: code of the positions of the stored entries; empty if all are stored.
    """

    entry: TensorEntry
    values: Tensor
    mask_code: Tensor


def encode_tensor(tensor: Tensor) -> EncodedTensor:
    """Encode a dense tensor on the CPU: without its zeros, or with them if that takes fewer bytes."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    entry_bytes = tensor.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.dtype.itemsize)
    mask = _find_nonzero(tensor, entry_bytes)
    kept = int(mask.sum())
    bits, code = encode_mask(mask)
    if kept * entry_bytes.shape[1] + len(code) >= entry_bytes.numel():
        entry = TensorEntry(shape, dtype, len(entry_bytes), zeros=len(entry_bytes) - kept)
        return EncodedTensor(entry, entry_bytes.T.flatten(), code[:0])
    entry = TensorEntry(shape, dtype, kept, bits, len(code))
    return EncodedTensor(entry, entry_bytes[mask].T.flatten(), code)


def _find_nonzero(tensor: Tensor, entry_bytes: Tensor) -> Tensor:
    """Return which entries are not 0 as bool, shape (numel,).

    The bytes of floats are compared instead of their values. Otherwise denormals would count as 0 where the processor
    flushes them, and float8 has no comparison.
    """
    if entry_bytes.shape[1] == 1:
        return entry_bytes.any(1).bool()
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor.flatten() != 0
    as_integers = entry_bytes.view(_INTEGER_OF_SIZE[tensor.real.dtype.itemsize])
    return (as_integers << 1).any(1)  # without the sign bit, as -0.0 counts as 0


# Decoding


class SparseFileReader:
    """Context manager that reads a sparse file.

    The layout is checked when the file is opened, and the bytes are checked before they are used.

    Attributes:
        path: path of the file.
        layout: the metadata: format, version, tensors, metrics and checksum.
        entries: how each tensor is stored, by name.
    """

    layout: dict[str, Any]
    entries: dict[str, TensorEntry]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with open(path, "rb"):  # raises an OSError that names the file if it can't be read
            pass

    def __enter__(self) -> SparseFileReader:
        try:
            opened: Any = safe_open(self.path, framework="pt")
            self._file = opened.__enter__()
        except SafetensorError as error:
            raise self._invalid(str(error)) from error
        try:
            self.layout = json.loads((self._file.metadata() or {})[METADATA_KEY])
            self.entries = {name: _entry_from_json(stored) for name, stored in self.layout["tensors"].items()}
            self.layout["metrics"], self.layout["version"], self.layout["crc32"]
        except KeyError as error:
            raise self._invalid(f"{error} is not in its metadata, so it was not written by `save_sparse`") from error
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise self._invalid(f"its metadata is invalid: {error}") from error
        if self.layout.get("format") != FORMAT_VERSION:
            raise AutoPruneError(
                f"{self.path} has the format {self.layout.get('format')!r}, and this version of lightning-autoprune"
                f" reads {FORMAT_VERSION}: read it with version {self.layout['version']} or newer."
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def _invalid(self, reason: str) -> AutoPruneError:
        return AutoPruneError(f"{self.path} is not a valid sparse file: {reason}. Write it again with `save_sparse`.")

    def read_tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, with their zeros.

        Raises:
            AutoPruneError: if the content is damaged.
        """
        try:
            content = {name: self._file.get_tensor(name) for name in ("values", "masks")}
            if any(t.dtype != torch.uint8 or t.dim() != 1 for t in content.values()):
                raise ValueError("its content is not bytes")
            layout = {key: value for key, value in self.layout.items() if key != "crc32"}
            if compute_checksum(layout, content) != self.layout["crc32"]:
                raise ValueError("its checksum does not match its content")
            return _decode_tensors(self.entries, content["values"], content["masks"])
        except (SafetensorError, zlib.error, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise self._invalid(str(error)) from error


def _decode_tensors(entries: Mapping[str, TensorEntry], stream: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a compressed stream of values and the codes of all masks, or raise an error."""
    for name, entry in entries.items():
        _check_counts(name, entry)
    values = _decompress(stream, sum(entry.kept * entry.itemsize for entry in entries.values()))
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if entry.same_as is not None:
            other = entries[entry.same_as]
            if entry != TensorEntry(other.shape, other.dtype, 0, same_as=entry.same_as):
                raise ValueError(f"{name!r} can't be the same as {entry.same_as!r}")
            tensors[name] = tensors[entry.same_as]
            continue
        length = entry.kept * entry.itemsize
        tensors[name] = _decode_tensor(entry, values[:length], masks[: entry.mask])
        values = values[length:]
        if entry.bits is not None:
            masks = masks[entry.mask :]
    if len(values) or len(masks):
        raise ValueError("it holds more than its tensors")
    return tensors


def _check_counts(name: str, entry: TensorEntry) -> None:
    """Raise an error if the numbers of an entry contradict each other."""
    is_tied, is_whole = entry.same_as is not None, entry.bits is None
    too_many = entry.kept > (0 if is_tied else entry.size)
    if too_many or (is_whole and not is_tied and entry.kept != entry.size):
        raise ValueError(f"it does not hold {entry.kept} values of {name!r}")
    if entry.zeros > (entry.kept if is_whole else 0):
        raise ValueError(f"it does not hold {entry.zeros} zeros of {name!r}")


def _decompress(stream: Tensor, size: int) -> Tensor:
    """Return the bytes of a zlib stream, or raise an error if there are not exactly ``size``; no more are allocated."""
    decompressor = zlib.decompressobj()
    values = decompressor.decompress(stream.numpy().data, size + 1)
    if len(values) != size or not decompressor.eof or decompressor.unused_data:
        raise ValueError(f"it does not hold {size} bytes of values")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)


def _decode_tensor(entry: TensorEntry, values: Tensor, mask_code: Tensor) -> Tensor:
    stored = values.view(entry.itemsize, entry.kept).T
    if entry.bits is None:
        entry_bytes = stored.clone(memory_format=torch.contiguous_format)  # a view may not start at a whole entry
    else:
        positions = decode_mask(mask_code, entry.size, entry.kept, entry.bits)
        entry_bytes = torch.zeros(entry.size, entry.itemsize, dtype=torch.uint8)
        entry_bytes[positions] = stored
    return entry_bytes.flatten().view(_DTYPES[entry.dtype]).view(entry.shape)
