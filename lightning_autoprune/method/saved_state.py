"""Save and restore auxiliary parameters: plain types and tensors of whole layers, for a checkpoint. Torch only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.masked_weights import mark_kept
from lightning_autoprune.tensors.bitmasks import pack, unpack

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["restore_state", "save_state", "select_layers"]


def save_state(aux: AuxiliaryParameters) -> dict[str, Any]:
    """Return all that resuming needs besides the weights T: packed masks, M, dormant weights, running averages."""
    layers = list(aux.weights.values())
    masks = [aux.placement.gather_for_saving(m, w) for m, w in zip(aux.masks(), layers, strict=True)]
    state: dict[str, Any] = {
        "granularity": aux.granularity.name,
        "granularity_state": aux.granularity.state_dict(),
        "shapes": {name: tuple(weight.shape) for name, weight in aux.weights.items()},
        "frozen": aux.masks_final,
        "scale": (aux.scale.mean_square, aux.scale.updates),
        "masks": [pack(mask) for mask in masks],
    }
    if not aux.masks_final:
        dormant = [aux.placement.gather_for_saving(d, w) for d, w in zip(aux.dormant, layers, strict=True)]
        state["buckets"] = [list(bucket.numbers) for bucket in aux.buckets]
        state["M"] = aux.granularity.whole(aux, aux.M)
        state["averages"] = {name: aux.granularity.whole(aux, views) for name, views in aux.averages.items()}
        state["updates"], state["threshold"] = list(aux.updates), aux.threshold
        state["dormant"] = [d[~mask] for d, mask in zip(dormant, masks, strict=True)]
    return state


def restore_state(aux: AuxiliaryParameters, state: Mapping[str, Any]) -> None:
    """Restore what :func:`save_state` gave, on weights that hold the T of the same step.

    Raises:
        AutoPruneError: if the state was made for other layers or shapes (which are named), by another granularity,
            or by a rule with other running averages.
    """
    _check_state(aux, state)
    aux.granularity.load_state_dict(state["granularity_state"])
    aux.scale.mean_square, aux.scale.updates = state["scale"]
    layers, shapes = list(aux.weights.values()), state["shapes"].values()
    whole_masks = [unpack(packed, shape) for packed, shape in zip(state["masks"], shapes, strict=True)]
    if not state["frozen"]:
        aux.lay_out(state["buckets"], state["updates"])  # the same buckets, so that sums are taken in the same order
        _restore_units(aux, state)
        aux.threshold = state.get("threshold", 0.0)  # older files lack it
    for i, (weight, mask) in enumerate(zip(layers, whole_masks, strict=True)):
        dormant = torch.zeros(mask.shape, dtype=weight.dtype, device="cpu")
        if not state["frozen"]:
            dormant.masked_scatter_(~mask, state["dormant"][i].to("cpu", weight.dtype))
        aux.dormant[i].copy_(aux.placement.shard(mark_kept(dormant, mask).to(weight.device), weight))
    aux.kept = [int(mask.sum()) for mask in whole_masks]
    if state["frozen"]:
        aux.forget()
    aux.after_weight_step()


def select_layers(
    state: Mapping[str, Any], weights: Mapping[str, Tensor], *, units_by_layer: bool = True
) -> dict[str, Any]:
    """Return the part of a saved state that belongs to some of its layers.

    Args:
        state: what :func:`save_state` gave.
        weights: the weights of these layers. A bucket is split where their dtypes or devices differ.
        units_by_layer: whether M and the running averages have one tensor per layer.
    """
    names = list(state["shapes"])
    chosen = [i for i, name in enumerate(names) if name in weights]

    def select(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in chosen]

    selected = {**state, "shapes": {names[i]: state["shapes"][names[i]] for i in chosen}}
    selected["masks"] = select(state["masks"])
    if state["frozen"]:
        return selected
    selected["dormant"] = select(state["dormant"])
    if units_by_layer:
        selected["M"] = select(state["M"])
        selected["averages"] = {name: select(values) for name, values in state["averages"].items()}
    buckets: dict[tuple[int, torch.dtype, torch.device], list[int]] = {}
    for k, numbers in enumerate(state["buckets"]):
        for i in numbers:
            if i in chosen:
                weight = weights[names[i]]
                buckets.setdefault((k, weight.dtype, weight.device), []).append(chosen.index(i))
    selected["buckets"] = list(buckets.values())
    if units_by_layer:
        selected["updates"] = [state["updates"][k] for k, *_ in buckets]
    return selected


def _restore_units(aux: AuxiliaryParameters, state: Mapping[str, Any]) -> None:
    """Restore M and the rule's running averages."""
    pairs = [(aux.M, state["M"]), *((aux.averages[name], saved) for name, saved in state["averages"].items())]
    for views, saved in pairs:
        for tensor, value in zip(views, aux.granularity.shard(aux, saved), strict=True):
            tensor.copy_(value)


def _check_state(aux: AuxiliaryParameters, state: Mapping[str, Any]) -> None:
    """Raise if a state is from another version, granularity or model, or from a rule with other running averages."""
    if "granularity" not in state:
        raise AutoPruneError(
            "The checkpoint's pruning state was written by an earlier version and can't be resumed: start from the"
            " checkpoint's weights alone."
        )
    if state["granularity"] != aux.granularity.name:
        raise AutoPruneError(
            f"The checkpoint's run pruned {state['granularity']}s, and this callback has"
            f' `granularity="{aux.granularity.name}"`: resume with the same granularity, or start from the'
            " checkpoint's weights alone."
        )
    _check_shapes(state["shapes"], {name: tuple(weight.shape) for name, weight in aux.weights.items()})
    if not state["frozen"] and set(state["averages"]) != set(aux.rule.state_names):
        raise AutoPruneError(
            f"The checkpoint's pruning state is of another update rule than {aux.rule_name!r}: resume with"
            " the same `update_rule`, or start from the checkpoint's weights alone."
        )


def _check_shapes(saved: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"layer {name!r} of the checkpoint is missing" for name in saved if name not in here]
    problems += [f"layer {name!r} is not in the checkpoint" for name in here if name not in saved]
    problems += [
        f"layer {name!r} has shape {here[name]} and {tuple(saved[name])} in the checkpoint"
        for name in saved
        if name in here and tuple(saved[name]) != here[name]
    ]
    if problems:
        raise AutoPruneError(
            f"The checkpoint's pruning state is for other layers: {'; '.join(problems)}. Build the same model with the"
            " same `include` and `exclude`, or start from its weights alone."
        )
