"""Which weights of a model can be pruned, and under which names. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_autoprune.errors import AutoPruneError, listed
from lightning_autoprune.tensors.sharding import reshard

__all__ = ["is_transposed_linear", "prunable_weights"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    trained_only: bool = True,
) -> dict[str, nn.Parameter]:
    """Finds the weights of all linear, convolution, recurrent and attention-projection layers.

    A weight that several layers share is listed once, under the first name; one that is shared with an embedding is an
    embedding. Embeddings are left out unless a pattern of ``include`` matches them, and so are weights without entries.

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
    chosen = _choose(model, include, exclude)
    weights: dict[str, nn.Parameter] = {}
    embeddings = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    left_out = [m for m in embeddings if not any(m is chosen_one for chosen_one, _ in chosen.values())]
    seen = {id(m._parameters.get("weight")) for m in left_out}
    for name, (module, attribute) in chosen.items():
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
                f"Layer {name!r} has sparse gradients, which can't be masked: make it with `sparse=False`, or"
                " exclude it."
            )
        wanted = weight.is_floating_point() and weight.numel() and (weight.requires_grad or not trained_only)
        if wanted and id(weight) not in seen:
            seen.add(id(weight))
            weights[name] = weight
    if not weights:
        raise AutoPruneError(
            f"None of the layers {listed(chosen)} has a trainable weight of its own: their `requires_grad` is off, they"
            " share it with an embedding, or it is empty."
        )
    return weights


def _choose(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, tuple[nn.Module, str]]:
    """Layers by name, as the module and the attribute that holds the weight."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise AutoPruneError(f"`{argument}` is {patterns!r}; it must be a list of patterns: [{patterns!r}].")
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        for attribute in _attributes(module):
            # a parametrization (spectral norm) would be computed, and moved on, by a look at the attribute
            if is_parametrized(module, attribute) or getattr(module, attribute, None) is not None:
                name = path if attribute == "weight" else f"{path}.{attribute}".lstrip(".")
                if not isinstance(module, _EMBEDDINGS) or (include and _chosen(name, include, None)):
                    found[name or "weight"] = (module, attribute)
    if not found:
        raise AutoPruneError(
            f"{type(model).__name__} has no layer to prune: there is no linear, convolution, recurrent or attention"
            " layer in it."
        )
    chosen = {name: place for name, place in found.items() if _chosen(name, include, exclude)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise AutoPruneError(
                    f"`{argument}` has {pattern!r}, which matches no layer; there are {listed(found)}."
                )
    if not chosen:
        raise AutoPruneError(f"`include` and `exclude` leave no layer to prune; there are {listed(found)}.")
    return chosen


def _attributes(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a layer that are matrices or kernels; not biases and norms."""
    if isinstance(module, (nn.Linear, _ConvNd, *_EMBEDDINGS)) or is_transposed_linear(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    if isinstance(module, nn.RNNBase):  # not its parameters' names, which are others if something computes the weights
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    return ()


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer that GPT-2 and its kin have in the package ``transformers``."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _chosen(name: str, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
