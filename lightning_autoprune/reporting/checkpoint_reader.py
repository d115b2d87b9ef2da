"""Read what a file says about its model and the pruning, without running anything in it."""

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
from lightning_autoprune.reporting.layer_table import LayerSummary, sum_layers, summarize_layers
from lightning_autoprune.reporting.run_history import RunHistory

__all__ = ["SavedModel", "find_pruning_state", "read_checkpoint"]

_LIGHTNING_KEY = "pytorch-lightning_version"  # Lightning writes it to all of its checkpoints, and nobody else does

_PHASE_SENTENCES = {
    None: "It has no pruning state: the layers below are all tensors with two or more dimensions.",
    "dense": "Saved in the dense phase, before pruning began.",
    "pruning": "Saved while the masks were still changing.",
    "frozen": "The masks are final.",
}


@dataclass(frozen=True)
class SavedModel:
    """A model as it was saved.

    Attributes:
        path: path of the file.
        state: all tensors by name.
        weights: prunable weights by layer name; without a pruning state, all tensors with two or more dimensions.
        phase: ``"dense"``, ``"pruning"`` or ``"frozen"`` (the masks are final); None without a pruning state.
        epoch: epoch of a Lightning checkpoint, else None.
        step: training step of a Lightning checkpoint, else None.
        history: history of the run; empty if the file has none.
        flops: floating-point operations of each dense layer, by layer name; empty if the run did not know them.
        by_lightning: whether Lightning saved the file, and with it the hyperparameters needed to build the model.
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
        """Count the zeros and return one row per layer."""
        known = bool(self.history.names) and self.phase != "dense"
        revived = dict(zip(self.history.names, self.history.revived, strict=True)) if known else None
        return summarize_layers(self.weights, self.flops, revived)

    def describe(self) -> str:
        """Say in two or three sentences how sparse the model is, and when it was saved."""
        total = sum_layers(self.layers())
        if not total.weights:
            return "It has no weights: no tensor has two or more dimensions."
        compression = f"{total.weights / total.kept:.1f}×" if total.kept else "none are kept"
        sentences = [f"{total.sparsity:.2%} of {total.weights:,} weights are 0 ({compression})."]
        if self.step is not None:
            epoch = "Step" if self.epoch is None else f"Epoch {self.epoch}, step"
            sentences.append(f"{epoch} {self.step:,}.")
        return " ".join([*sentences, _PHASE_SENTENCES[self.phase]])

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, in types that JSON has."""
        rows = self.layers()
        total = sum_layers(rows)
        return {
            "file": str(self.path),
            "phase": self.phase,
            "epoch": self.epoch,
            "step": self.step,
            "sparsity": total.sparsity,
            "compression": total.weights / total.kept if total.kept else None,
            "layers": [row.as_dict() for row in rows],
            "curves": self.history.curves,
            "metric": self.history.metric,
            "path": [
                {**point._asdict(), "value": point.value if math.isfinite(point.value) else None}
                for point in self.history.points
            ],
        }


def read_checkpoint(path: str | os.PathLike[str]) -> SavedModel:
    """Read a Lightning checkpoint, a file of ``torch.save(model.state_dict())``, or a safetensors file.

    Where the format allows it, tensors are memory-mapped, and read only when they are counted. Nothing in the file is
    executed (``weights_only=True``).

    Args:
        path: path of the file.

    Raises:
        AutoPruneError: if the file is of another kind or incomplete, holds Python objects other than plain values and
            tensors, or has an invalid pruning state.
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
    is_safetensors = len(head) == 9 and head[8:] == b"{"  # eight bytes of length, then JSON
    content: Any = _read_safetensors(path) if is_safetensors else _read_torch(path)
    if not isinstance(content, Mapping):
        raise AutoPruneError(f"{path} holds {type(content).__name__}, not a state dict or a checkpoint.")
    state = content.get("state_dict", content)
    entries = state.items() if isinstance(state, Mapping) else []
    tensors = {str(name): _to_dense(path, str(name), x) for name, x in entries if isinstance(x, Tensor)}
    if not tensors:
        raise AutoPruneError(f"{path} holds no tensors by name, so it is not a checkpoint of a model.")
    pruning_state = find_pruning_state(content)
    if pruning_state is None:
        return SavedModel(
            path,
            tensors,
            {name.removesuffix(".weight"): _to_countable(x) for name, x in tensors.items() if x.dim() > 1},
            epoch=_int_or_none(content, "epoch"),
            step=_int_or_none(content, "global_step"),
            by_lightning=_LIGHTNING_KEY in content,
        )
    try:
        return _interpret_pruning_state(path, tensors, content, pruning_state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AutoPruneError(
            f"The pruning state in {path} can't be read ({type(error).__name__}: {error}): another version of"
            " lightning-autoprune wrote it, or the file was changed."
        ) from error


def find_pruning_state(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state of ``AutoPruneCallback`` in a checkpoint's content; None if there is none."""
    callbacks = content.get("callbacks")
    states = callbacks.values() if isinstance(callbacks, Mapping) else []
    ours = (s for s in states if isinstance(s, Mapping) and s.keys() >= {"pruner", "report", "held_out"})
    return next(ours, None)


def _interpret_pruning_state(
    path: Path, tensors: dict[str, Tensor], content: Mapping[str, Any], pruning_state: Mapping[str, Any]
) -> SavedModel:
    history = RunHistory.from_state_dict(pruning_state["report"]["history"])
    auxiliary = pruning_state["pruner"]["auxiliary"]
    keys = {name: f"{name}.weight" if f"{name}.weight" in tensors else name for name in history.names}
    return SavedModel(
        path,
        tensors,
        weights={name: _to_countable(tensors[key]) for name, key in keys.items()},
        phase="dense" if auxiliary is None else "frozen" if auxiliary["frozen"] else "pruning",
        epoch=_int_or_none(content, "epoch"),
        step=_int_or_none(content, "global_step"),
        history=history,
        flops={str(name): int(count) for name, count in (pruning_state["flops"] or {}).items()},
        by_lightning=_LIGHTNING_KEY in content,
    )


def _int_or_none(content: Mapping[str, Any], key: str) -> int | None:
    """Return an entry if it is an integer: in files that Lightning did not write, it may be anything."""
    value = content.get(key)
    return value if type(value) is int else None


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
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise AutoPruneError(
                f"{path} holds a Python object ({refused[1]}), and loading one may run any code, so it is not loaded."
                " Save the checkpoint with `weights_only=True` (`ModelCheckpoint(save_weights_only=True)`), or keep"
                " such objects out of `save_hyperparameters`."
            ) from error
        raise _damaged_file_error(path, error) from error
    except Exception as error:  # on arbitrary bytes torch raises many kinds of error, even AssertionError
        raise _damaged_file_error(path, error) from error


def _to_dense(path: Path, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor with all its entries stored, the zeros included."""
    if tensor.is_meta or tensor.is_quantized:
        kind = "on the meta device, without values" if tensor.is_meta else f"quantized ({tensor.dtype})"
        raise AutoPruneError(
            f"{name!r} in {path} is {kind}: save the model with its values, as floating-point numbers."
        )
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _to_countable(weight: Tensor) -> Tensor:
    """Return the weight in a dtype whose zeros can be counted: float8 can't be compared with 0."""
    return weight.float() if weight.is_floating_point() and weight.dtype.itemsize == 1 else weight


def _damaged_file_error(path: Path, error: Exception) -> AutoPruneError:
    first = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0]
    reason = f"{type(error).__name__}: {first[:200]}".rstrip(".: ")
    return AutoPruneError(
        f"{path} is not a checkpoint, or not a complete one: {reason}. Give a Lightning checkpoint, a file of"
        " `torch.save(model.state_dict(), …)`, or a safetensors file."
    )
