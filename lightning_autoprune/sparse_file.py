"""Sparse files: tensors without their zeros, in one safetensors file that is safe to open whoever made it.

The file has two tensors of bytes: ``values``, the entries of all tensors that are not 0, and ``masks``, where they
belong (see :mod:`lightning_autoprune.indices`). The values are there byte by byte, first all lowest bytes of a tensor,
last all highest, as a zlib stream: signs and exponents of weights are much alike. The metadata have one entry, JSON:
shape, dtype and code of each tensor (those without zeros have no mask), the package's version, the caller's own
figures, and a checksum.
"""

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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.files import replacing
from lightning_autoprune.indices import decode, encode
from lightning_autoprune.shards import is_sharded

__all__ = ["load_sparse", "load_sparse_into", "save_sparse", "sparse_metadata"]

_KEY, _FORMAT = "lightning_autoprune", 1
_ALWAYS_ALLOWED = 2**28  # bytes that a file may grow to, whatever its size
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


def save_sparse(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metrics: Mapping[str, float] | None = None
) -> None:
    """Writes a model's state, or tensors by name, without the zeros: exact, whatever the dtype.

    A tensor that is there under several names (tied weights) is stored once. A zero comes back as 0.0 even where it was
    -0.0 (which masking by multiplication leaves behind); everything else has the bits that it had, NaN included.

    Args:
        model: a module, of which ``state_dict()`` is stored, or a state dict.
        path: of the file; it is replaced whole or not at all.
        metrics: figures to keep in the metadata.

    Raises:
        AutoPruneError: for an entry that is not a dense tensor of at most 64 dimensions, has no shape yet or is sharded
            (FSDP2), and for a name that is no string; names it.

    Example:
        >>> import tempfile
        >>> weight = torch.tensor([[0.0, 1.5], [0.0, 0.0]])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_sparse({"weight": weight}, f"{directory}/pruned.safetensors", metrics={"val_error": 0.02})
        ...     load_sparse(f"{directory}/pruned.safetensors")
        {'weight': tensor([[0.0000, 1.5000],
                [0.0000, 0.0000]])}
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    entries: dict[str, _Entry] = {}
    values, masks = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, dtype=torch.uint8)]
    first: dict[tuple[Any, ...], tuple[str, Tensor]] = {}  # by place in memory, which the tensor keeps from reuse
    for name in (*state, *(metrics or {})):
        _check_name(name)
    for name, tensor in state.items():
        _check_dense(name, tensor)
        tensor = tensor.detach()
        lazy = tensor.is_conj(), tensor.is_neg()
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), *lazy)
        known, _ = first.setdefault(place, (name, tensor)) if tensor.numel() else (name, tensor)
        if known != name:
            entries[name] = _Entry(tuple(tensor.shape), entries[known].dtype, 0, same_as=known)
            continue
        entries[name], stored, code = _entry(tensor.resolve_conj().resolve_neg().cpu())
        values.append(stored)
        masks.append(code)
    stream = zlib.compress(torch.cat(values).numpy().data, 9)
    content = {"values": torch.frombuffer(bytearray(stream), dtype=torch.uint8), "masks": torch.cat(masks)}
    layout = {
        "format": _FORMAT,
        "version": _version(),
        "tensors": {name: _brief(entry) for name, entry in entries.items()},
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
    }
    layout["crc32"] = _checksum(layout, content)
    with replacing(path) as temporary:
        save_file(content, temporary, {_KEY: json.dumps(layout, separators=(",", ":"))})


def load_sparse(path: str | os.PathLike[str], *, max_expansion: float = 1000.0) -> dict[str, Tensor]:
    """Reads a file of :func:`save_sparse`: tensors by name on the CPU, zeros and all, as they were saved.

    Args:
        path: of the file.
        max_expansion: how many times its own size the file may grow to in memory, > 0. Up to 256 MiB any file may; the
            limit is there for files that claim to be huge.

    Raises:
        AutoPruneError: if the file is not a whole, unchanged file of :func:`save_sparse`, or grows beyond the limit.
            Nothing in a file is ever executed.
        OSError: if it can't be read.
    """
    with _Opened(path) as file:
        allowed = max(_ALWAYS_ALLOWED, max_expansion * os.path.getsize(path))
        size = sum(entry.nbytes for entry in file.entries.values() if entry.same_as is None)
        if size > allowed:
            raise AutoPruneError(
                f"{path} is {os.path.getsize(path)} bytes long and would grow to {size}, more than `max_expansion="
                f"{max_expansion:g}` allows. Raise it if you trust the file, or use `load_sparse_into` a model."
            )
        return file.tensors()


def load_sparse_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Reads a file of :func:`save_sparse` into a model of the same architecture, in place.

    Args:
        model: a module with the names and shapes of the file; dtypes and devices may differ.
        path: of the file.

    Raises:
        AutoPruneError: if the model is lazy, or the file is damaged, or made of another architecture; names every key
            that is missing, not expected or of another shape. The model is unchanged then.
        OSError: if it can't be read.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        _check_not_lazy(name, tensor)
    with _Opened(path) as file:
        problems = [f"{name!r} is missing in the file" for name in state if name not in file.entries]
        for name, entry in file.entries.items():
            if name not in state:
                problems.append(f"{name!r} is not in the model")
            elif entry.shape != tuple(state[name].shape):
                there, here = entry.shape, tuple(state[name].shape)
                problems.append(f"{name!r} has shape {there} in the file and {here} in the model")
        if problems:
            raise AutoPruneError(
                f"{path} is of another architecture than {type(model).__name__}: {'; '.join(problems)}. Build the model"
                " that was saved, or take the tensors one by one from `load_sparse`."
            )
        model.load_state_dict(file.tensors())


def sparse_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of :func:`save_sparse` says of itself, without reading the tensors.

    Returns:
        ``"version"`` of the package, ``"sparsity"`` (fraction of zeros in [0, 1] by tensor name, of those with any) and
        ``"metrics"``, as given.

    Raises:
        AutoPruneError: if it is no such file.
        OSError: if it can't be read.
    """
    with _Opened(path) as file:
        stored = {n: e if e.same_as is None else file.entries.get(e.same_as, e) for n, e in file.entries.items()}
        with_zeros = {n: e for n, e in stored.items() if e.zeros or e.bits is not None}
        sparsity = {n: 1 - (e.kept - e.zeros) / max(e.size, 1) for n, e in with_zeros.items()}
        return {"version": file.layout["version"], "sparsity": sparsity, "metrics": file.layout["metrics"]}


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


def _check_name(name: object) -> None:
    if not isinstance(name, str):  # JSON has no others
        raise AutoPruneError(
            f"The name {name!r} is of the type {type(name).__name__}; tensors and metrics must be named by strings:"
            f" {str(name)!r}."
        )


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise AutoPruneError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor: leave it out and keep it elsewhere."
        )
    _check_not_lazy(name, tensor)
    if is_sharded(tensor):
        raise AutoPruneError(
            f"{name!r} is sharded, and this rank has a part of it only: save what `full_tensor()` gives, called on all"
            " ranks, or the `state_dict` of a checkpoint that is one file (`save_distributed_checkpoint=False`)."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}, dtype {tensor.dtype}"
        raise AutoPruneError(f"{name!r} is {kind}; only dense tensors with values can be stored: convert it first.")
    if tensor.dim() > _MOST_DIMENSIONS:
        raise AutoPruneError(
            f"{name!r} has {tensor.dim()} dimensions; at most {_MOST_DIMENSIONS} can be stored: reshape it first."
        )


def _check_not_lazy(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise AutoPruneError(f"{name!r} is lazy and has no shape yet: run one batch through the model first.")


def _entry(tensor: Tensor) -> tuple[_Entry, Tensor, Tensor]:
    """How a tensor is stored, the bytes of the entries that are, and the code of where they are."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    raw = _as_rows(tensor)
    mask = _not_zero(tensor, raw)
    kept = int(mask.sum())
    bits, code = encode(mask)
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
            kept = decode(masks[: entry.mask], n, entry.kept, entry.bits)
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


def _version() -> str:
    from lightning_autoprune import __version__  # the package imports this module

    return __version__
