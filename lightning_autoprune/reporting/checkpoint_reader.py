"""A reader for checkpoints of several kinds, which never runs code from a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.reporting.checkpoint_content import find_state_dict, load_content
from lightning_autoprune.reporting.layer_table import LayerSummary, sum_layers, summarize_layers
from lightning_autoprune.reporting.name_matching import match_names
from lightning_autoprune.reporting.run_history import RunHistory
from lightning_autoprune.tensors.bitmasks import as_bits, unpack

__all__ = ["SavedModel", "find_pruning_state", "read_checkpoint"]

_LIGHTNING_KEY = "pytorch-lightning_version"  # Lightning writes it to all of its checkpoints, and nobody else does

_FLOAT8 = [v for name, v in vars(torch).items() if name.startswith("float8_")]

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
        missing: layers of the pruning state whose weights are not in the file.
        left_out: entries beside the tensors, such as ``_extra_state``, and what they are, by name.
        entry: the entry of the file that holds the tensors; None if that is the whole file, or ``state_dict``.
        other_entries: further entries that hold tensors by name, such as an average; they are not read.
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
    missing: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    entry: str | None = None
    other_entries: tuple[str, ...] = ()

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
        return " ".join([*sentences, _PHASE_SENTENCES[self.phase], *self.notes()])

    def notes(self) -> list[str]:
        """Return a sentence for all that was expected and not found, or found and not read."""
        notes = []
        if self.missing and len(self.missing) == len(self.history.names):
            notes.append(
                f"None of the run's layers ({_list_names(self.missing)}) is in the file: the layers below are all"
                " tensors with two or more dimensions."
            )
        elif self.missing:
            notes.append(f"Layers of the run that are not in the file: {_list_names(self.missing)}.")
        if self.left_out:
            kinds = [f"{name!r} ({kind})" for name, kind in self.left_out.items()]
            notes.append(f"Entries that are passed over: {_shorten(kinds)}.")
        if self.entry is not None:
            others = f"; there are also {_list_names(self.other_entries)}" if self.other_entries else ""
            notes.append(f"The weights are those in the entry {self.entry!r}{others}.")
        return notes

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
            "missing": list(self.missing),
            "left_out": dict(self.left_out),
            "entry": self.entry,
            "other_entries": list(self.other_entries),
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
    executed: objects other than plain values and tensors, such as some hyperparameters, are passed over. If the user
    has changed the names of the weights or left some out, the layers that can be found are read.

    Args:
        path: path of the file.

    Raises:
        AutoPruneError: if the file is of another kind or incomplete, holds no tensors by name, or has an invalid
            pruning state.
        OSError: if it can't be read.

    Example:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"first.weight": torch.tensor([[0.0, 1.0]])}, f"{directory}/state.pt")
        ...     read_checkpoint(f"{directory}/state.pt").layers()[0].sparsity
        0.5
    """
    path = Path(path)
    content = load_content(path)
    found = find_state_dict(path, content)
    saved = SavedModel(
        path,
        found.tensors,
        {name.removesuffix(".weight"): _to_countable(x) for name, x in found.tensors.items() if x.dim() > 1},
        epoch=_int_or_none(content, "epoch"),
        step=_int_or_none(content, "global_step"),
        by_lightning=_LIGHTNING_KEY in content,
        left_out=found.left_out,
        entry=None if found.entry == "state_dict" else found.entry,
        other_entries=() if found.entry == "state_dict" else found.other_entries,
    )
    pruning_state = find_pruning_state(content)
    if pruning_state is None:
        return saved
    try:
        return _interpret_pruning_state(saved, pruning_state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
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


def _interpret_pruning_state(saved: SavedModel, pruning_state: Mapping[str, Any]) -> SavedModel:
    """Return what was read with the run's phase, history and layers."""
    history = RunHistory.from_state_dict(pruning_state["report"]["history"])
    auxiliary = pruning_state["pruner"]["auxiliary"]
    keys = _find_weights(history.names, saved.state, auxiliary)
    return replace(
        saved,
        weights={name: _to_countable(saved.state[key]) for name, key in keys.items()} if keys else saved.weights,
        phase="dense" if auxiliary is None else "frozen" if auxiliary["frozen"] else "pruning",
        history=history,
        flops={str(name): int(count) for name, count in (pruning_state["flops"] or {}).items()},
        missing=tuple(name for name in history.names if name not in keys),
    )


def _find_weights(
    layers: Sequence[str], tensors: Mapping[str, Tensor], auxiliary: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return the key of each layer's weight; layers whose weight is not in the file are left out.

    A weight under another name than in the run is recognized by its shape, and by 0 wherever the layer is pruned.
    """
    layer_of = {f"{name}.weight" if f"{name}.weight" in tensors else name: name for name in layers}
    keys = {layer: name for name, layer in layer_of.items() if name in tensors}
    masks = dict(zip(auxiliary["shapes"], auxiliary["masks"], strict=True)) if auxiliary else {}

    def fits(name: str, key: str) -> bool:
        layer, weight = layer_of[name], _to_countable(tensors[key])
        if auxiliary is None or layer not in masks:
            return weight.dim() > 1
        shape = tuple(auxiliary["shapes"][layer])
        return tuple(weight.shape) == shape and not (weight.bool() & ~unpack(masks[layer], shape)).any()

    for ending in (".weight", ""):
        layer_of = {f"{name}{ending}": name for name in layers if name not in keys}
        free = [key for key in tensors if key not in keys.values()]
        keys |= {layer_of[name]: key for name, key in match_names(layer_of, free, fits).items()}
    return {name: keys[name] for name in layers if name in keys}


def _int_or_none(content: Mapping[Any, Any], key: str) -> int | None:
    """Return an entry if it is an integer: in files that Lightning did not write, it may be anything."""
    value = content.get(key)
    return value if type(value) is int else None


def _to_countable(weight: Tensor) -> Tensor:
    """Return the weight in a dtype whose zeros can be counted."""
    if weight.is_quantized:
        return weight.dequantize()
    try:
        weight.flatten()[:1].count_nonzero()
        return weight
    except NotImplementedError:
        return weight.float() if weight.dtype in _FLOAT8 else as_bits(weight)  # by value, as -0.0 is a zero too


def _list_names(names: Sequence[str]) -> str:
    return _shorten([quote_names([name]) for name in names])


def _shorten(items: Sequence[str], most: int = 6) -> str:
    """Join items with commas, and say how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
