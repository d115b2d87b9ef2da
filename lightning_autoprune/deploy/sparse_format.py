"""The format of a sparse file: how tensors become bytes, and the checks before bytes become tensors."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_autoprune.deploy.gap_coding import decode_mask, encode_mask
from lightning_autoprune.errors import AutoPruneError

__all__ = [
    "_AS_INTEGER",
    "_BELOW",
    "_DTYPES",
    "_FORMAT",
    "_KEY",
    "_MOST_DIMENSIONS",
    "_Entry",
    "_Opened",
    "_as_rows",
    "_brief",
    "_checksum",
    "_entry",
    "_inflate",
    "_not_zero",
    "_read_entry",
    "_restore",
]

_KEY, _FORMAT = "lightning_autoprune", 1

_MOST_DIMENSIONS = 64

_BELOW = 2**48  # all numbers of a file, that of a tensor's entries too

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Entry:
    """How a tensor is stored.

    Attributes:
        kept: number of entries that are stored.
        bits: number of bits of each gap between them that are stored as they are; None where all entries are stored.
        mask: length of the mask's code, in bytes.
        same_as: name of the tensor that this one is; it has no bytes of its own.
        zeros: number of zeros among the entries that are stored; only where all are.
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
        """Number of entries, zeros and all."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor with its zeros."""
        return self.size * _DTYPES[self.dtype].itemsize


class _Opened:
    """A file under a context manager: its layout is checked before anything is read, its bytes before they are used."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        with open(path, "rb"):  # a file that is not there is an OSError with its name
            pass

    def __enter__(self) -> _Opened:
        try:
            opened: Any = safe_open(self.path, framework="pt")
            self._file = opened.__enter__()
        except SafetensorError as error:
            raise self._damaged(str(error)) from error
        try:
            self.layout = json.loads((self._file.metadata() or {})[_KEY])
            self.entries = {name: _read_entry(brief) for name, brief in self.layout["tensors"].items()}
            self.layout["metrics"], self.layout["version"], self.layout["crc32"]
        except KeyError as error:
            raise self._damaged(f"{error} is not in its metadata, so `save_sparse` has not written it") from error
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged(f"its metadata make no sense: {error}") from error
        if self.layout.get("format") != _FORMAT:
            raise AutoPruneError(
                f"{self.path} has the format {self.layout.get('format')!r}, and this version of lightning-autoprune"
                f" reads {_FORMAT}: read it with version {self.layout['version']} or newer."
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def _damaged(self, reason: str) -> AutoPruneError:
        return AutoPruneError(f"{self.path} is not a whole sparse file: {reason}. Make it anew with `save_sparse`.")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, zeros and all."""
        try:
            content = {name: self._file.get_tensor(name) for name in ("values", "masks")}
            if any(t.dtype != torch.uint8 or t.dim() != 1 for t in content.values()):
                raise ValueError("its content is not bytes")
            layout = {key: value for key, value in self.layout.items() if key != "crc32"}
            if _checksum(layout, content) != self.layout["crc32"]:
                raise ValueError("its checksum is not that of its content")
            return _restore(self.entries, content["values"], content["masks"])
        except (SafetensorError, zlib.error, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(str(error)) from error


def _entry(tensor: Tensor) -> tuple[_Entry, Tensor, Tensor]:
    """How a tensor is stored, the bytes of the entries that are, and the code of where they are."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    raw = _as_rows(tensor)
    mask = _not_zero(tensor, raw)
    kept = int(mask.sum())
    bits, code = encode_mask(mask)
    if kept * raw.shape[1] + len(code) >= raw.numel():
        return _Entry(shape, dtype, len(raw), zeros=len(raw) - kept), raw.T.flatten(), code[:0]
    return _Entry(shape, dtype, kept, bits, len(code)), raw[mask].T.flatten(), code


def _not_zero(tensor: Tensor, raw: Tensor) -> Tensor:
    """Which entries are not 0, by their bytes: float8 has no !=, which takes denormals for 0 where they are flushed."""
    if raw.shape[1] == 1:
        return raw.any(1).bool()
    if not tensor.is_floating_point() and not tensor.is_complex():
        return tensor.flatten() != 0
    return (raw.view(_AS_INTEGER[tensor.real.dtype.itemsize]) << 1).any(1)  # without the sign, as -0.0 is 0


def _as_rows(tensor: Tensor) -> Tensor:
    """The bytes of each entry, shape (numel, itemsize)."""
    return tensor.contiguous().flatten().view(torch.uint8).view(tensor.numel(), tensor.dtype.itemsize)


def _inflate(stream: Tensor, size: int) -> Tensor:
    """The bytes of a zlib stream that must be so many; no more are ever made."""
    inflater = zlib.decompressobj()
    values = inflater.decompress(stream.numpy().data, size + 1)
    if len(values) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"it does not hold {size} bytes of values")
    return torch.frombuffer(bytearray(values), dtype=torch.uint8) if values else torch.empty(0, dtype=torch.uint8)


def _restore(entries: Mapping[str, _Entry], stream: Tensor, masks: Tensor) -> dict[str, Tensor]:
    for name, entry in entries.items():
        alone, whole = entry.same_as is None, entry.bits is None
        if entry.kept > entry.size or (entry.kept and not alone) or (alone and whole and entry.kept != entry.size):
            raise ValueError(f"it does not hold {entry.kept} values of {name!r}")
        if entry.zeros > (entry.kept if whole else 0):
            raise ValueError(f"it does not hold {entry.zeros} zeros of {name!r}")
    values = _inflate(stream, sum(entry.kept * _DTYPES[entry.dtype].itemsize for entry in entries.values()))
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if entry.same_as is not None:
            other = entries[entry.same_as]
            if entry != _Entry(other.shape, other.dtype, 0, same_as=entry.same_as):
                raise ValueError(f"{name!r} is not what {entry.same_as!r} is")
            tensors[name] = tensors[entry.same_as]
            continue
        n, size = entry.size, _DTYPES[entry.dtype].itemsize
        stored = values[: entry.kept * size].view(size, entry.kept).T
        values = values[entry.kept * size :]
        if entry.bits is None:
            raw = stored.clone(memory_format=torch.contiguous_format)  # a view may not start at a whole entry
        else:
            kept = decode_mask(masks[: entry.mask], n, entry.kept, entry.bits)
            masks = masks[entry.mask :]
            raw = torch.zeros(n, size, dtype=torch.uint8)
            raw[kept] = stored
        tensors[name] = raw.flatten().view(_DTYPES[entry.dtype]).view(entry.shape)
    if len(values) or len(masks):
        raise ValueError("it holds more than its tensors")
    return tensors


def _brief(entry: _Entry) -> dict[str, Any]:
    defaults = _Entry((), "", 0)
    return {key: value for key, value in asdict(entry).items() if value != getattr(defaults, key) or key == "shape"}


def _read_entry(brief: Mapping[str, Any]) -> _Entry:
    entry = _Entry(**{"kept": 0, **brief, "shape": tuple(brief["shape"])})
    if len(entry.shape) > _MOST_DIMENSIONS:  # whose product would take long
        raise ValueError(f"a tensor of {len(entry.shape)} dimensions, and {_MOST_DIMENSIONS} are allowed")
    numbers = [*entry.shape, entry.kept, entry.mask, entry.zeros, *([] if entry.bits is None else [entry.bits])]
    if not all(type(number) is int and 0 <= number < _BELOW for number in numbers) or entry.dtype not in _DTYPES:
        raise ValueError(f"a tensor with {brief}")
    if not isinstance(entry.same_as, str | None):
        raise ValueError(f"a tensor that is the same as {entry.same_as!r}")
    if entry.size >= _BELOW:
        raise ValueError(f"a tensor of shape {entry.shape}, and fewer than 2**48 entries are allowed")
    return entry


def _checksum(layout: Mapping[str, Any], content: Mapping[str, Tensor]) -> str:
    crc = zlib.crc32(json.dumps(layout, sort_keys=True).encode())
    for name in sorted(content):
        crc = zlib.crc32(content[name].numpy().data, crc)
    return f"{crc:08x}"
