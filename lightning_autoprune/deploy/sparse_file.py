"""Sparse files: tensors without their zeros, in one safetensors file that is safe to open whoever made it.

The file has two tensors of bytes: ``values``, the entries of all tensors that are not 0, and ``masks``, where they
belong (see ``gap_coding``). The values are there byte by byte, first all lowest bytes of a tensor,
last all highest, as a zlib stream: signs and exponents of weights are much alike. The metadata have one entry, JSON:
shape, dtype and code of each tensor (those without zeros have no mask), the package's version, the caller's own
figures, and a checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_autoprune._version import __version__
from lightning_autoprune.deploy.atomic_write import atomic_write
from lightning_autoprune.deploy.sparse_format import (
    _FORMAT,
    _KEY,
    _MOST_DIMENSIONS,
    _brief,
    _checksum,
    _Entry,
    _entry,
    _Opened,
)
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.tensors.sharding import is_sharded

__all__ = ["load_sparse", "load_sparse_into", "save_sparse", "sparse_metadata"]

_ALWAYS_ALLOWED = 2**28  # bytes that a file may grow to, whatever its size


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
        "version": __version__,
        "tensors": {name: _brief(entry) for name, entry in entries.items()},
        "metrics": {name: float(value) for name, value in (metrics or {}).items()},
    }
    layout["crc32"] = _checksum(layout, content)
    with atomic_write(path) as temporary:
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
