"""Sparse files: tensors without their zeros, in a safetensors file that is safe to open whoever made it.

The file has two tensors of bytes. ``values`` has the nonzero entries of all tensors, and ``masks`` has the positions
that they belong to (see ``gap_coding``). The values of a tensor are stored byte by byte: the lowest bytes of all
entries first, the highest last. All values are compressed as one zlib stream. The byte order helps with that, as the
signs and exponents of weights are much alike. The metadata has one entry in JSON: shape, dtype and code of each tensor
(tensors without zeros have no mask), the package's version, the caller's metrics, and a checksum.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_autoprune._version import __version__
from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.sparse_format import (
    FORMAT_VERSION,
    MAX_DIMENSIONS,
    METADATA_KEY,
    SparseFileReader,
    TensorEntry,
    compute_checksum,
    encode_tensor,
    entry_to_json,
)
from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.tensors.sharding import is_sharded

__all__ = ["is_extra_state", "load_sparse", "load_sparse_into", "save_sparse", "sparse_metadata"]

_ALWAYS_ALLOWED = 2**28  # bytes that a file may expand to, whatever its size


def save_sparse(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metrics: Mapping[str, float] | None = None
) -> None:
    """Write a model's state, or tensors by name, to a file without the zeros. This is exact for every dtype.

    A tensor with several names (tied weights) is stored once. A zero is read back as 0.0 even if it was -0.0, which
    masking by multiplication can produce. All other values keep their bits, NaN included. Entries of a module's state
    that are not tensors, such as the ``_extra_state`` of some layers, are left out with a warning.

    Args:
        model: a module, of which ``state_dict()`` is stored, or a state dict.
        path: path of the file; it is replaced whole or not at all.
        metrics: numbers to store in the metadata.

    Raises:
        AutoPruneError: if an entry of a state dict is not a tensor and no ``_extra_state``; if a tensor is not dense,
            has more than 64 dimensions or no shape yet, or is sharded (FSDP2); or if a name is not a string. Names it.

    Example:
        >>> import tempfile
        >>> weight = torch.tensor([[0.0, 1.5], [0.0, 0.0]])
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_sparse({"weight": weight}, f"{directory}/pruned.safetensors", metrics={"val_error": 0.02})
        ...     load_sparse(f"{directory}/pruned.safetensors")
        {'weight': tensor([[0.0000, 1.5000],
                [0.0000, 0.0000]])}
    """
    for name in (*(state := _select_tensors(model)), *(metrics or {})):
        _check_name(name)
    entries, values, masks = _encode_state(state)
    stream = zlib.compress(values.numpy().data, 9)
    content = {"values": torch.frombuffer(bytearray(stream), dtype=torch.uint8), "masks": masks}
    layout = {
        "format": FORMAT_VERSION,
        "version": __version__,
        "tensors": {name: entry_to_json(entry) for name, entry in entries.items()},
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
    }
    layout["crc32"] = compute_checksum(layout, content)
    with atomic_write(path) as temporary:
        save_file(content, temporary, {METADATA_KEY: json.dumps(layout, separators=(",", ":"))})


def _select_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state without the entries that may be left out, and warn of them."""
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    others = [name for name, x in state.items() if not isinstance(x, Tensor)]
    left_out = [name for name in others if isinstance(model, nn.Module) or is_extra_state(str(name))]
    if with_content := [name for name in left_out if state[name] is not None]:
        warnings.warn(
            f"A sparse file has tensors only. Left out are {quote_names(with_content)}: `load_sparse_into` leaves them"
            " as they are in the model.",
            stacklevel=3,
        )
    return {name: x for name, x in state.items() if name not in left_out}


def is_extra_state(name: str) -> bool:
    """Return True if a key is that of a module's extra state, which may be of any type."""
    return name.rpartition(".")[2] == "_extra_state"


class _EncodedState(NamedTuple):
    """Tensors as they are stored: how each is stored by name, the bytes of all values, and the codes of all masks."""

    entries: dict[str, TensorEntry]
    values: Tensor
    masks: Tensor


def _encode_state(state: Mapping[str, Tensor]) -> _EncodedState:
    entries: dict[str, TensorEntry] = {}
    values, masks = [torch.empty(0, dtype=torch.uint8)], [torch.empty(0, dtype=torch.uint8)]
    first_names: dict[tuple[Any, ...], tuple[str, Tensor]] = {}  # holds each tensor, so that its memory is not reused
    for name, tensor in state.items():
        _check_dense(name, tensor)
        tensor = tensor.detach()
        first_name = name
        if tensor.numel():
            first_name, _ = first_names.setdefault(_memory_identity(tensor), (name, tensor))
        if first_name != name:
            entries[name] = TensorEntry(tuple(tensor.shape), entries[first_name].dtype, 0, same_as=first_name)
            continue
        encoded = encode_tensor(tensor.resolve_conj().resolve_neg().cpu())
        entries[name] = encoded.entry
        values.append(encoded.values)
        masks.append(encoded.mask_code)
    return _EncodedState(entries, torch.cat(values), torch.cat(masks))


def _memory_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share only if they are the same values in the same memory."""
    lazy_flags = tensor.is_conj(), tensor.is_neg()
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), *lazy_flags)


def load_sparse(path: str | os.PathLike[str], *, max_expansion: float = 1000.0) -> dict[str, Tensor]:
    """Read a file of :func:`save_sparse`; return its tensors by name on the CPU, as they were saved, with their zeros.

    Args:
        path: path of the file.
        max_expansion: how many times its own size a file may take in memory, > 0. Up to 256 MiB are always allowed. The
            limit protects against files that claim to be huge.

    Raises:
        AutoPruneError: if the file is not a complete, unchanged file of :func:`save_sparse`, or if it expands beyond
            the limit. Nothing in a file is ever executed.
        OSError: if the file can't be read.
    """
    with SparseFileReader(path) as file:
        allowed = max(_ALWAYS_ALLOWED, max_expansion * os.path.getsize(path))
        size = sum(entry.nbytes for entry in file.entries.values() if entry.same_as is None)
        if size > allowed:
            raise AutoPruneError(
                f"{path} is {os.path.getsize(path)} bytes long and would expand to {size}, more than `max_expansion="
                f"{max_expansion:g}` allows. Raise it if you trust the file, or use `load_sparse_into` a model."
            )
        return file.read_tensors()


def load_sparse_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read a file of :func:`save_sparse` into a model of the same architecture, in place.

    Entries of the model's state that are not tensors, such as the ``_extra_state`` of some layers, stay as they are.

    Args:
        model: a module with the names and shapes in the file; dtypes and devices may differ.
        path: path of the file.

    Raises:
        AutoPruneError: if the model is lazy, or if the file is damaged or of another architecture; names every key that
            is missing, unexpected or of another shape. The model is unchanged then.
        OSError: if the file can't be read.
    """
    state = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    for name, tensor in state.items():
        _check_not_lazy(name, tensor)
    with SparseFileReader(path) as file:
        problems = [f"{name!r} is missing in the file" for name in state if name not in file.entries]
        for name, entry in file.entries.items():
            if name not in state:
                problems.append(f"{name!r} is not in the model")
            elif entry.shape != (model_shape := tuple(state[name].shape)):
                problems.append(f"{name!r} has shape {entry.shape} in the file and {model_shape} in the model")
        if problems:
            raise AutoPruneError(
                f"{path} has another architecture than {type(model).__name__}: {'; '.join(problems)}. Build the model"
                " that was saved, or take single tensors from `load_sparse`."
            )
        model.load_state_dict(file.read_tensors(), strict=False)  # all tensors have been checked


def sparse_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the metadata of a file of :func:`save_sparse`, without reading the tensors.

    Returns:
        ``"version"`` of the package that wrote it, ``"sparsity"`` (fraction of zeros in [0, 1] by tensor name, for
        tensors with zeros) and ``"metrics"``, as given.

    Raises:
        AutoPruneError: if it is no such file.
        OSError: if the file can't be read.
    """
    with SparseFileReader(path) as file:
        entries = {n: e if e.same_as is None else file.entries.get(e.same_as, e) for n, e in file.entries.items()}
        with_zeros = {name: entry for name, entry in entries.items() if entry.zeros or entry.bits is not None}
        sparsity = {name: 1 - (entry.kept - entry.zeros) / max(entry.size, 1) for name, entry in with_zeros.items()}
        return {"version": file.layout["version"], "sparsity": sparsity, "metrics": file.layout["metrics"]}


def _check_name(name: object) -> None:
    if not isinstance(name, str):  # JSON has no other keys
        raise AutoPruneError(
            f"The name {name!r} is of the type {type(name).__name__}; names of tensors and metrics must be strings:"
            f" {str(name)!r}."
        )


def _check_dense(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise AutoPruneError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor: leave it out and store it elsewhere."
        )
    _check_not_lazy(name, tensor)
    if is_sharded(tensor):
        raise AutoPruneError(
            f"{name!r} is sharded, and this rank has only its shard: save the result of `full_tensor()`, called on all"
            " ranks, or the `state_dict` of a checkpoint that is one file (`save_distributed_checkpoint=False`)."
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}, dtype {tensor.dtype}"
        raise AutoPruneError(f"{name!r} is {kind}; only dense tensors with values can be stored: convert it first.")
    if tensor.dim() > MAX_DIMENSIONS:
        raise AutoPruneError(
            f"{name!r} has {tensor.dim()} dimensions; at most {MAX_DIMENSIONS} can be stored: reshape it first."
        )


def _check_not_lazy(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise AutoPruneError(f"{name!r} is lazy and has no shape yet: run one batch through the model first.")
