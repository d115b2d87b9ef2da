"""Finds the weights of a model that can be pruned, and names them. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_autoprune.errors import AutoPruneError, quote_names
from lightning_autoprune.tensors.sharding import reshard

__all__ = ["is_transposed_linear", "prunable_weights"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class _WeightPlace(NamedTuple):
    """Where a weight is: the module, and the attribute that holds or computes the weight."""

    module: nn.Module
    attribute: str


def prunable_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    trained_only: bool = True,
) -> dict[str, nn.Parameter]:
    """Find the weights of all linear, convolution, recurrent and attention-projection layers.

    A weight that several layers share is listed once, under the first name. One that is shared with an embedding counts
    as an embedding. Embeddings are left out unless a pattern of ``include`` matches them. Weights without entries are
    always left out.

    Args:
        model: any module.
        include: layer-name patterns (``fnmatch``: ``"encoder.*"``); only matching layers, embeddings too. None: all
            but embeddings.
        exclude: layer-name patterns; matching layers are left out. None: none.
        trained_only: whether weights that are not trained (``requires_grad`` off) are left out too.

    Returns:
        Parameters by layer name, in the order of the model: the module's qualified name for a ``weight``,
        else the parameter's (``attention.in_proj_weight``, ``lstm.weight_ih_l0``).

    Raises:
        AutoPruneError: if there is no such layer, a pattern matches none of them, or a chosen layer has
            no weight to write into (lazy, or computed by a parametrization).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> {name: tuple(weight.shape) for name, weight in prunable_weights(model, exclude=["2"]).items()}
        {'0': (3, 4)}
    """
    reshard(model)
    chosen = _choose_places(model, include, exclude)
    weights: dict[str, nn.Parameter] = {}
    chosen_modules = {id(place.module) for place in chosen.values()}
    seen = {
        id(module._parameters.get("weight"))
        for module in model.modules()
        if isinstance(module, _EMBEDDINGS) and id(module) not in chosen_modules
    }
    for name, place in chosen.items():
        weight = _writable_weight(name, place)
        wanted = weight.is_floating_point() and weight.numel() and (weight.requires_grad or not trained_only)
        if wanted and id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    if not weights:
        raise AutoPruneError(
            f"None of the layers {quote_names(chosen)} has a trainable weight of its own: their `requires_grad` is off,"
            " they share it with an embedding, or it is empty."
        )
    return weights


def _writable_weight(name: str, place: _WeightPlace) -> nn.Parameter:
    """Return the parameter of a layer, or raise an error if it can't be pruned in place."""
    module, attribute = place
    if is_parametrized(module, attribute):
        raise AutoPruneError(
            f"Layer {name!r} computes its {attribute} by a parametrization, so there is no weight to prune in"
            f" place: remove it with `torch.nn.utils.parametrize.remove_parametrizations`, or exclude the layer."
        )
    weight = getattr(module, attribute)
    if not isinstance(weight, nn.Parameter):
        raise AutoPruneError(
            f"Layer {name!r} computes its {attribute} before each forward (weight norm, another pruning tool), so"
            f" there is no parameter to prune in place: remove that, or exclude the layer."
        )
    if is_lazy(weight):
        raise AutoPruneError(
            f"Layer {name!r} is lazy and has no shape yet: run one batch through the model before fitting."
        )
    if isinstance(module, _EMBEDDINGS) and module.sparse:
        raise AutoPruneError(
            f"Layer {name!r} has sparse gradients, which can't be masked: make it with `sparse=False`, or exclude it."
        )
    return weight


def _choose_places(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, _WeightPlace]:
    """Return the places of the weights that the patterns choose, by layer name."""
    pattern_lists = (("include", include), ("exclude", exclude))
    for argument, patterns in pattern_lists:
        if isinstance(patterns, str):
            raise AutoPruneError(f"`{argument}` is {patterns!r}; it must be a list of patterns: [{patterns!r}].")
    places = _find_places(model, include)
    if not places:
        raise AutoPruneError(
            f"{type(model).__name__} has no layer to prune: there is no linear, convolution, recurrent or attention"
            " layer in it."
        )
    for argument, patterns in pattern_lists:
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in places):
                raise AutoPruneError(
                    f"`{argument}` has {pattern!r}, which matches no layer; there are {quote_names(places)}."
                )
    chosen = {name: place for name, place in places.items() if _is_chosen(name, include, exclude)}
    if not chosen:
        raise AutoPruneError(f"`include` and `exclude` leave no layer to prune; there are {quote_names(places)}.")
    return chosen


def _find_places(model: nn.Module, include: Sequence[str] | None) -> dict[str, _WeightPlace]:
    """Return the places of all weights by layer name; embeddings only if a pattern of ``include`` matches them."""
    places: dict[str, _WeightPlace] = {}
    for path, module in model.named_modules():
        for attribute in _weight_attributes(module):
            # getattr would compute a parametrized weight, and change it (spectral norm)
            if is_parametrized(module, attribute) or getattr(module, attribute, None) is not None:
                name = path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
                if not isinstance(module, _EMBEDDINGS) or (include and _is_chosen(name, include, None)):
                    places[name or "weight"] = _WeightPlace(module, attribute)
    return places


def _weight_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a layer that hold matrices or kernels, without biases and norms."""
    if isinstance(module, (nn.Linear, _ConvNd, *_EMBEDDINGS)) or is_transposed_linear(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    if isinstance(module, nn.RNNBase):  # its parameters have other names if something computes the weights
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    return ()


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of GPT-2 and its relatives in the package ``transformers``."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _is_chosen(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    included = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
