"""What a file says of its pruning, read without running anything that is in it. Torch only."""

from __future__ import annotations

import math
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_autoprune.deploy.sparse_file import load_sparse, sparse_metadata
from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.reporting.layer_table import LayerSummary, summarize_layers, total_row
from lightning_autoprune.reporting.run_history import RunHistory

__all__ = ["SavedModel", "pruning_state", "read_checkpoint"]

_LIGHTNINGS = "pytorch-lightning_version"


@dataclass(frozen=True)
class SavedModel:
    """A model as it was saved.

    Attributes:
        path: of the file.
        state: all its tensors by name.
        weights: the prunable ones by layer name; where the file has no pruning state, all of two dimensions or more.
        phase: ``"dense"``, ``"pruning"`` or ``"frozen"``; None where the file has no pruning state.
        epoch: of a Lightning checkpoint.
        step: of a Lightning checkpoint.
        history: of the run; empty where there is none.
        flops: operations of the dense layers, by name, where the run knew them.
        by_lightning: whether Lightning saved it, and with it the hyper-parameters that make the model.
    """

    path: Path
    state: dict[str, Tensor]
    weights: dict[str, Tensor]
    phase: str | None = None
    epoch: int | None = None
    step: int | None = None
    history: RunHistory = field(default_factory=RunHistory)
    flops: dict[str, int] = field(default_factory=dict)
    by_lightning: bool = False

    def layers(self) -> list[LayerSummary]:
        """A row for each layer, whose zeros are counted."""
        known = bool(self.history.names) and self.phase != "dense"
        revived = dict(zip(self.history.names, self.history.revived, strict=True)) if known else None
        return summarize_layers(self.weights, self.flops, revived)

    def as_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON has."""
        rows = self.layers()
        whole = total_row(rows)
        return {
            "file": str(self.path),
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "sparsity": whole.sparsity,
            "compression": whole.weights / whole.kept if whole.kept else None,
            "layers": [row.as_dict() for row in rows],
            "curves": self.history.curves,
            "metric": self.history.metric,
            "path": [
                {"step": step, "sparsity": sparsity, "value": value if math.isfinite(value) else None}
                for step, sparsity, value in self.history.points
            ],
        }


def read_checkpoint(path: str | os.PathLike[str]) -> SavedModel:
    """Reads a Lightning checkpoint, a file of ``torch.save(model.state_dict())``, or a safetensors file.

    Tensors are mapped from the file where its format allows that, and read as they are counted. Nothing in a file is
    executed (``weights_only=True``).

    Args:
        path: of the file.

    Raises:
        AutoPruneError: if it is not a whole file of such a kind, holds Python objects beside plain values and tensors,
            or a pruning state that makes no sense.
        OSError: if it can't be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"first.weight": torch.tensor([[0.0, 1.0]])}, f"{directory}/state.pt")
        ...     read_checkpoint(f"{directory}/state.pt").layers()[0].sparsity
        0.5
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":  # a length, then JSON
        content: Any = _read_safetensors(path)
    else:
        content = _read_torch(path)
    if not isinstance(content, Mapping):
        raise AutoPruneError(f"{path} holds {type(content).__name__}, no state dict or checkpoint.")
    state = content.get("state_dict", content)
    named = state.items() if isinstance(state, Mapping) else []
    tensors = {str(name): _dense(path, str(name), x) for name, x in named if isinstance(x, Tensor)}
    if not tensors:
        raise AutoPruneError(f"{path} holds no tensors by name, so it is no checkpoint of a model.")
    ours = pruning_state(content)
    if ours is None:
        return SavedModel(
            path,
            tensors,
            {name.removesuffix(".weight"): _countable(x) for name, x in tensors.items() if x.dim() > 1},
            epoch=_number(content, "epoch"),
            step=_number(content, "global_step"),
            by_lightning=_LIGHTNINGS in content,
        )
    try:
        return _with_pruning(path, tensors, content, ours)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AutoPruneError(
            f"The pruning state in {path} can't be read ({type(error).__name__}: {error}): another version of"
            " lightning-autoprune wrote it, or the file was changed."
        ) from error


def pruning_state(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of ``AutoPruneCallback`` in what a checkpoint holds; None if there is none."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    ours = (s for s in states if isinstance(s, Mapping) and s.keys() >= {"pruner", "report", "held_out"})
    return next(ours, None)


def _number(content: Mapping[str, Any], key: str) -> int | None:
    value = content.get(key)  # of a file that Lightning has not written it may be anything
    return value if type(value) is int else None


def _with_pruning(
    path: Path, tensors: dict[str, Tensor], content: Mapping[str, Any], state: Mapping[str, Any]
) -> SavedModel:
    history = RunHistory.of(state["report"]["history"])
    auxiliary = state["pruner"]["auxiliary"]
    keys = {name: f"{name}.weight" if f"{name}.weight" in tensors else name for name in history.names}
    return SavedModel(
        path,
        tensors,
        {name: _countable(tensors[key]) for name, key in keys.items()},
        "dense" if auxiliary is None else "frozen" if auxiliary["frozen"] else "pruning",
        _number(content, "epoch"),
        _number(content, "global_step"),
        history,
        {str(name): int(count) for name, count in (state["flops"] or {}).items()},
        _LIGHTNINGS in content,
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        sparse_metadata(path)
    except AutoPruneError as ours:
        try:
            return load_file(path)
        except (SafetensorError, ValueError):
            raise ours from None
    return load_sparse(path)


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle; what can't be read is an error
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # of before PyTorch 1.6
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise AutoPruneError(
                f"{path} holds a Python object ({refused[1]}), and loading one may run any code, so it is not loaded."
                " Save the checkpoint with `weights_only=True` (`ModelCheckpoint(save_weights_only=True)`), or keep"
                " such objects out of `save_hyperparameters`."
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:  # what bytes that make no sense raise in torch, its assertions among them
        raise _damaged(path, error) from error


def _dense(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, as one that has all its entries."""
    if tensor.is_meta or tensor.is_quantized:
        kind = "on the meta device, without values" if tensor.is_meta else f"quantized ({tensor.dtype})"
        raise AutoPruneError(
            f"{name!r} in {path} is {kind}: save the model with its values, as floating-point numbers."
        )
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _countable(weight: Tensor) -> Tensor:
    """The weight, in a dtype that can be compared with 0, which float8 can't."""
    return weight.float() if weight.is_floating_point() and weight.dtype.itemsize == 1 else weight


def _damaged(path: Path, error: Exception) -> AutoPruneError:
    first = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0]
    reason = f"{type(error).__name__}: {first[:200]}".rstrip(".: ")
    return AutoPruneError(
        f"{path} is not a checkpoint, or not a whole one: {reason}. Give a checkpoint of Lightning, a file of"
        " `torch.save(model.state_dict(), …)`, or a safetensors file."
    )
