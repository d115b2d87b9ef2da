"""The content of a checkpoint file of any kind, without running code from it."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_autoprune.deploy.sparse_file import is_extra_state, load_sparse, sparse_metadata
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.reporting import inert_pickle

__all__ = ["StateDict", "find_state_dict", "load_content"]

_USUAL_ENTRIES = ("state_dict", "model", "model_state_dict", "module", "net", "network", "weights")


class StateDict(NamedTuple):
    """The tensors of a model in a file.

    Attributes:
        tensors: the tensors with all their entries stored, the zeros included, by name.
        left_out: what the other entries are, by name.
        entry: the entry of the file that holds them; None if the file holds nothing else.
        other_entries: entries that hold tensors by name as well.
    """

    tensors: dict[str, Tensor]
    left_out: dict[str, str]
    entry: str | None
    other_entries: tuple[str, ...]


def load_content(path: Path) -> Mapping[Any, Any]:
    """Return what a file holds; objects other than plain values and tensors are replaced by stand-ins.

    Args:
        path: a file of ``torch.save``, such as a Lightning checkpoint, or a safetensors file.

    Raises:
        AutoPruneError: if the file is of another kind or incomplete, or a folder of a sharded checkpoint.
        OSError: if it can't be read.
    """
    if (path / ".metadata").is_file():
        raise AutoPruneError(
            f"{path} is a folder, which a sharded strategy saved. Make one file of it first: python -m"
            f" lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    if (path / "checkpoint").is_dir():
        raise AutoPruneError(
            f"{path} is a folder, which DeepSpeed saved. Make one file of it first, with"
            " `lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict`."
        )
    with path.open("rb") as file:
        head = file.read(9)
    is_safetensors = len(head) == 9 and head[8:] == b"{"  # eight bytes of length, then JSON
    content: Any = _read_safetensors(path) if is_safetensors else _read_torch(path)
    if not isinstance(content, Mapping):
        raise AutoPruneError(
            f"{path} holds {type(content).__name__}, not a state dict or a checkpoint: save `model.state_dict()`."
        )
    return content


def find_state_dict(path: Path, content: Mapping[Any, Any]) -> StateDict:
    """Find the tensors of a model in the content of a file.

    They are in an entry such as ``"state_dict"`` or ``"model"``; else in the mapping that holds the most tensors, which
    may be the content itself.

    Raises:
        AutoPruneError: if there are none.
    """
    candidates = dict(_find_tensors_by_name(content))
    usual = [name for name in _USUAL_ENTRIES if name in candidates]
    entry = next(iter(usual), None) or max(candidates, key=lambda name: _count_tensors(candidates[name]), default=None)
    if not usual and (entry is None or _count_tensors(content) >= _count_tensors(candidates[entry])):
        entry, candidates = None, {}
    state = content if entry is None else candidates[entry]
    tensors, left_out = {}, {}
    for name, value in state.items():
        dense = _to_dense(value)
        if isinstance(dense, Tensor):
            tensors[str(name)] = dense
        elif entry is not None or isinstance(value, Tensor) or is_extra_state(str(name)):
            left_out[str(name)] = dense  # a file that is itself a state dict may have numbers and settings beside it
    if not tensors:
        known = "; ".join(f"{name!r} is {what}" for name, what in list(left_out.items())[:3])
        raise AutoPruneError(
            f"{path} holds no tensors by name, so it is not a checkpoint of a model{known and ': ' + known}."
        )
    return StateDict(tensors, left_out, entry, tuple(name for name in candidates if name != entry))


def _find_tensors_by_name(content: Mapping[Any, Any], depth: int = 2) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the mappings in a file's content that hold tensors, with the path of each, such as ``"ema.model"``."""
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping):
            if _count_tensors(value):
                yield name, value
            elif depth > 1:
                yield from ((f"{name}.{inner}", state) for inner, state in _find_tensors_by_name(value, depth - 1))


def _count_tensors(state: Any) -> int:
    return sum(isinstance(value, Tensor) for value in state.values()) if isinstance(state, Mapping) else 0


def _to_dense(value: Any) -> Tensor | str:
    """Return a tensor with all its entries stored, or say what an entry is whose values can't be had."""
    if not isinstance(value, Tensor):
        return f"of the type {type(value).__name__}"
    if value.is_meta:
        return "on the meta device, without values"
    if value.layout == torch.strided and not value.is_nested:
        return value
    try:
        return value.to_dense()
    except (RuntimeError, NotImplementedError) as error:
        return f"of the layout {value.layout}, which does not become dense ({str(error).splitlines()[0]})"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        sparse_metadata(path)
    except AutoPruneError as not_sparse:
        try:
            return load_file(path)
        except (SafetensorError, ValueError):
            raise not_sparse from None
    return load_sparse(path)


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols: what can't be read raises an error anyway
            try:
                return _load(path, weights_only=True)
            except pickle.UnpicklingError:  # an object that torch does not know, or a damaged file
                return _load(path, weights_only=False, pickle_module=inert_pickle)
    except Exception as error:  # on arbitrary bytes torch raises many kinds of error, even AssertionError
        raise _damaged_file_error(path, error) from error


def _load(path: Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, **options)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", **options)  # the format before PyTorch 1.6


def _damaged_file_error(path: Path, error: Exception) -> AutoPruneError:
    first = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0]
    reason = f"{type(error).__name__}: {first[:200]}".rstrip(".: ")
    return AutoPruneError(
        f"{path} is not a checkpoint, or not a complete one: {reason}. Give a Lightning checkpoint, a file of"
        " `torch.save(model.state_dict(), …)`, or a safetensors file."
    )
