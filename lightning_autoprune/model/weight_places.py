"""Where the matrices of a model are: in layers of known kinds, in embeddings, or as bare parameters. Torch only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

__all__ = ["Obstacle", "WeightKind", "WeightPlace", "find_weight_places", "is_plain_linear", "is_transposed_linear"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Obstacle(str):
    """Why a weight can't be pruned in place, and what to do, as a predicate of its layer: "is lazy: run a batch"."""

    __slots__ = ()


class WeightKind(Enum):
    """What a weight is for, which decides when it is pruned."""

    LAYER = auto()
    """The weight of a layer of a known kind: pruned by default."""
    EMBEDDING = auto()
    """An embedding: pruned if a pattern of ``include`` matches it."""
    BARE = auto()
    """A matrix that no layer of a known kind has: pruned if a pattern of ``include`` matches it."""
    INGREDIENT = auto()
    """What a computed weight is computed from: pruned if a pattern of ``include`` matches nothing of other kinds."""
    VECTOR = auto()
    """A bias, normalization or vector in the shape of a matrix: pruned as an ingredient is."""


class WeightPlace(NamedTuple):
    """Where a weight is.

    Attributes:
        module: the module that has it.
        attribute: the attribute that holds or computes it.
        kind: what it is for.
        parameter_name: qualified name of the parameter that the attribute holds.
        owner: name of the computed weight that this one is an ingredient of, or its own name.
    """

    module: nn.Module
    attribute: str
    kind: WeightKind
    parameter_name: str
    owner: str

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter; None if the weight is computed."""
        return self.module._parameters.get(self.attribute)

    @property
    def obstacle(self) -> Obstacle | None:
        """Why the weight can't be pruned in place; None if it can."""
        if is_parametrized(self.module, self.attribute):
            return Obstacle(
                f"computes its {self.attribute} by a parametrization, so there is no weight to prune in place: remove"
                " it with `torch.nn.utils.parametrize.remove_parametrizations`, or exclude the layer"
            )
        if self.parameter is None:
            return Obstacle(
                f"computes its {self.attribute} before each forward (weight norm, another pruning tool), so there is"
                " no parameter to prune in place: remove that, or exclude the layer"
            )
        if is_lazy(self.parameter):
            return Obstacle("is lazy and has no shape yet: run one batch through the model before fitting")
        if isinstance(self.module, _EMBEDDINGS) and self.module.sparse:
            return Obstacle("has sparse gradients, which can't be masked: make it with `sparse=False`, or exclude it")
        return None


def find_weight_places(model: nn.Module) -> dict[str, WeightPlace]:
    """Find the weights of all layers, and all other parameters with two or more dimensions.

    Nothing is computed: a weight with a parametrization may change when it is read (spectral norm).

    Returns:
        The places by name, in the order of the model: the module's qualified name for a ``weight``, else the
        parameter's (``attention.in_proj_weight``, ``lstm.weight_ih_l0``, ``experts.gate_up_proj``).

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3)})
        >>> [(name, place.kind.name) for name, place in find_weight_places(model).items()]
        [('embed', 'EMBEDDING'), ('head', 'LAYER')]
    """
    places: dict[str, WeightPlace] = {}
    for path, module in model.named_modules():
        for attribute, kind in _attributes(module):
            parameter_name = f"{path}.{attribute}".lstrip(".")
            name = path if path and attribute == "weight" else parameter_name
            places[name] = WeightPlace(module, attribute, kind, parameter_name, _owner(path, attribute, module, name))
    return places


def _owner(path: str, attribute: str, module: nn.Module, name: str) -> str:
    """Return the name of the computed weight that a parameter is an ingredient of, or the parameter's own."""
    if isinstance(module, ParametrizationList):  # its path is <layer>.parametrizations.<attribute>
        layer, _, computed = path.rpartition(".parametrizations.")
        computed = computed or path.removeprefix("parametrizations.")
    else:
        layer, computed = path, next((c for c in _computed(module) if attribute.startswith(f"{c}_")), "")
        if not computed:
            return name
    return layer if layer and computed == "weight" else f"{layer}.{computed}".lstrip(".")


def _attributes(module: nn.Module) -> Iterator[tuple[str, WeightKind]]:
    """Yield the attributes of a module that are places of weights: those of known layers first."""
    known = _layer_attributes(module)
    kind = WeightKind.EMBEDDING if isinstance(module, _EMBEDDINGS) else WeightKind.LAYER
    for attribute in known:
        if module._parameters.get(attribute) is not None or attribute in _computed(module):
            yield attribute, kind
    for attribute, parameter in module._parameters.items():
        if attribute not in known and parameter is not None and not is_lazy(parameter) and parameter.dim() > 1:
            yield attribute, _kind_of_parameter(module, attribute, parameter)


def _kind_of_parameter(module: nn.Module, attribute: str, parameter: nn.Parameter) -> WeightKind:
    """Return what a parameter is that no layer of a known kind has."""
    class_name = type(module).__name__
    if "embed" in attribute.lower() or (attribute == "weight" and "Embed" in class_name):
        return WeightKind.EMBEDDING
    if isinstance(module, ParametrizationList) or any(attribute.startswith(f"{name}_") for name in _computed(module)):
        return WeightKind.INGREDIENT
    is_matrix = sum(size > 1 for size in parameter.shape) > 1
    if not is_matrix or "bias" in attribute or "Norm" in class_name:
        return WeightKind.VECTOR
    return WeightKind.BARE


def _computed(module: nn.Module) -> list[str]:
    """Return the attributes of a layer of a known kind that are computed rather than parameters."""
    return [name for name in _layer_attributes(module) if _is_computed(module, name)]


def _is_computed(module: nn.Module, attribute: str) -> bool:
    if attribute in module._parameters:
        return False
    return is_parametrized(module, attribute) or inspect.getattr_static(module, attribute, None) is not None


def _layer_attributes(module: nn.Module) -> tuple[str, ...]:
    """Return the attributes of a layer of a known kind that hold matrices or kernels, without biases and norms."""
    if isinstance(module, (nn.Linear, nn.Bilinear, _ConvNd, *_EMBEDDINGS)) or is_plain_linear(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    if isinstance(module, nn.RNNBase):  # its parameters have other names if something computes the weights
        return tuple(name for name in module._flat_weights_names if name.startswith("weight_"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    return tuple(_expert_weights(module))


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of GPT-2 and its relatives in the package ``transformers``."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_plain_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that does not derive from ``nn.Linear``, of PyG or ``transformers``."""
    return is_transposed_linear(module) or any(
        kind.__module__.startswith("torch_geometric.") and kind.__name__.endswith("Linear")
        for kind in type(module).__mro__
    )


def _expert_weights(module: nn.Module) -> Iterator[str]:
    """Yield the weights of a mixture of experts that has those of all experts in one parameter."""
    names = [kind.__name__ for kind in type(module).__mro__]
    if any(name.endswith(("Experts", "ExpertGLU")) for name in names):
        for attribute, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and "bias" not in attribute:
                stacked = parameter.dim() > 2  # one matrix per expert
                if stacked or (parameter.dim() == 2 and "DbrxExpertGLU" in names):
                    yield attribute
