"""Choose which weights of a model are pruned, and name them. Torch only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_autoprune.errors import AutoPruneError, check_patterns, quote_names
from lightning_autoprune.model.weight_places import Obstacle, WeightKind, WeightPlace, find_weight_places
from lightning_autoprune.tensors.sharding import reshard
from lightning_autoprune.tensors.shared_memory import covers, find_overlaps, shares_entries

__all__ = [
    "WeightChoice",
    "choose_weights",
    "describe_obstacles",
    "matches",
    "prunable_weights",
    "without_shared_memory",
]


@dataclass(frozen=True)
class WeightChoice:
    """Which weights of a model are pruned once they are trained.

    Attributes:
        places: all places of weights, by name, chosen or not.
        weights: the chosen parameters by name, trained or not; memory that several share is listed once.
        obstacles: why other weights, which would be pruned too, can't be, by layer name.
    """

    places: dict[str, WeightPlace]
    weights: dict[str, nn.Parameter]
    obstacles: dict[str, Obstacle]


def prunable_weights(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    trained_only: bool = True,
) -> dict[str, nn.Parameter]:
    """Find the weights of all linear, bilinear, convolution, recurrent, attention-projection and expert layers.

    A weight, or memory, that several layers share is listed once, under the first name. One that is shared with an
    embedding counts as an embedding. Embeddings and bare parameters are left out unless a pattern of ``include``
    matches them. Weights without entries are always left out, and so are those that can't be pruned
    in place: computed (weight norm, a parametrization), lazy, or with sparse gradients.

    Args:
        model: any module.
        include: patterns (``fnmatch``: ``"encoder.*"``) of layer names or parameter names. Only what matches is
            returned: layers, embeddings, and all other floating-point parameters with two or more dimensions. Biases,
            normalizations and vectors in the shape of a matrix are returned only for a pattern that matches nothing
            else. None: all layers, but no embeddings and no bare parameters.
        exclude: patterns of the same kind; what matches is left out. None: nothing.
        trained_only: whether weights that are not trained (``requires_grad`` off) are left out too.

    Returns:
        Parameters by layer name, in the order of the model: the module's qualified name for a ``weight``,
        else the parameter's (``attention.in_proj_weight``, ``lstm.weight_ih_l0``, ``experts.gate_up_proj``).

    Raises:
        AutoPruneError: if nothing can be pruned, a pattern matches nothing, or only weights that can't be written
            into.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> {name: tuple(weight.shape) for name, weight in prunable_weights(model, exclude=["2"]).items()}
        {'0': (3, 4)}
    """
    choice = choose_weights(model, include, exclude)
    weights = {name: w for name, w in choice.weights.items() if w.requires_grad or not trained_only}
    if weights:
        return weights
    if choice.obstacles:
        raise AutoPruneError(describe_obstacles(choice.obstacles))
    if not choice.weights and not _wanted(choice.places, include, exclude):
        raise AutoPruneError(f"{type(model).__name__} has no layer to prune: {_list_names(choice.places)}.")
    raise AutoPruneError(
        f"None of the layers {quote_names(_wanted(choice.places, include, exclude))} has a trainable weight of its own:"
        " their `requires_grad` is off, they share it with an embedding, or it is empty."
    )


def describe_obstacles(obstacles: Mapping[str, Obstacle]) -> str:
    """Return one sentence per reason why weights can't be pruned, with the names of the layers that have it."""
    names: dict[str, list[str]] = {}
    for name, why in obstacles.items():
        names.setdefault(why, []).append(name)
    return " ".join(
        f"{'Layer' if len(layers) == 1 else 'Each of the layers'} {quote_names(layers)} {why}."
        for why, layers in names.items()
    )


def choose_weights(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> WeightChoice:
    """Choose the weights to prune, as :func:`prunable_weights` describes, whether or not they are trained.

    Raises:
        AutoPruneError: if the model has no matrix, a pattern matches nothing, or only weights that can't be written
            into (all are named).
    """
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if patterns is not None:
            check_patterns(argument, patterns)
    reshard(model)
    places = find_weight_places(model)
    _check_patterns(type(model).__name__, places, include, exclude)
    chosen = {name: places[name] for name in _wanted(places, include, exclude)}
    has_layers = any(place.kind is WeightKind.LAYER for place in places.values())
    if not chosen and (has_layers or include is not None):
        raise AutoPruneError(f"`include` and `exclude` leave no layer to prune; {_list_names(places)}.")
    obstacles = {name: why for name, place in chosen.items() if (why := place.obstacle)}
    weights = {
        name: w for name, place in chosen.items() if name not in obstacles and (w := place.parameter) is not None
    }
    weights = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    dense = [
        weight
        for name, place in places.items()
        if place.kind is WeightKind.EMBEDDING and name not in chosen and (weight := place.parameter) is not None
    ]
    weights, partly = without_shared_memory(weights, dense)
    partly_shared = Obstacle("shares a part of its memory with another weight, so only one of them can be pruned")
    return WeightChoice(places, weights, {**obstacles, **dict.fromkeys(partly, partly_shared)})


def matches(name: str, place: WeightPlace, patterns: Iterable[str]) -> bool:
    """Return True if a pattern matches the name of a layer, or that of its parameter."""
    names = (name, place.parameter_name)
    return any(fnmatchcase(either, pattern) for pattern in patterns for either in names)


def _wanted(
    places: Mapping[str, WeightPlace], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[str]:
    """Return the names that the patterns choose, in the order of the model."""
    if include is None:
        names = {name for name, place in places.items() if place.kind is WeightKind.LAYER}
    else:
        names = {name for pattern in include for name in _matching(places, pattern)}
    return [name for name in places if name in names and not matches(name, places[name], exclude or ())]


def _matching(places: Mapping[str, WeightPlace], pattern: str) -> list[str]:
    """Return what a pattern of ``include`` takes in: weights to prune, or if it matches none, all else it matches."""
    found = [name for name, place in places.items() if matches(name, place, [pattern])]
    special = (WeightKind.INGREDIENT, WeightKind.VECTOR)
    usual = [name for name in found if places[name].kind not in special]
    return usual or found


def _check_patterns(
    model: str, places: Mapping[str, WeightPlace], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> None:
    """Raise if there is nothing to choose from, or a pattern matches nothing that can be pruned."""
    if not any(place.kind is not WeightKind.VECTOR for place in places.values()) and not include:
        raise AutoPruneError(
            f"{model} has no layer to prune: there is no linear, convolution, recurrent or attention layer in it."
        )
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(matches(name, place, [pattern]) for name, place in places.items()):
                raise AutoPruneError(f"`{argument}` has {pattern!r}, which matches no layer; {_list_names(places)}.")
    named = {name for pattern in include or () for name in _matching(places, pattern) if _all_blocked(places, pattern)}
    wanted = {
        name: place for name, place in places.items() if name in named and not matches(name, place, exclude or ())
    }
    blocked = {name: why for name, place in wanted.items() if (why := place.obstacle)}
    if blocked:
        raise AutoPruneError(describe_obstacles(blocked))


def _all_blocked(places: Mapping[str, WeightPlace], pattern: str) -> bool:
    return all(places[name].obstacle for name in _matching(places, pattern))


def _list_names(places: Mapping[str, WeightPlace]) -> str:
    """Return which layers there are, and what else `include` can name."""
    layers = [name for name, place in places.items() if place.kind is WeightKind.LAYER]
    others = [n for n, place in places.items() if place.kind in (WeightKind.EMBEDDING, WeightKind.BARE)]
    parts = [f"there are {quote_names(layers)}"] if layers else []
    parts += [f"`include` can name {quote_names(others)}{' too' if layers else ''}"] if others else []
    return ", and ".join(parts) or "there is none"


def without_shared_memory(
    weights: Mapping[str, nn.Parameter], dense: Sequence[nn.Parameter]
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """Return weights of which no two share memory, and none shares any with a dense one.

    Of several with the same memory, the first stays, or the first that is trained.

    Args:
        weights: by name.
        dense: parameters that stay dense.

    Returns:
        The weights that stay, and the names of those that go although only a part of their memory is shared.
    """
    names: dict[int, str] = {}
    for name, weight in weights.items():
        if not any(weight is other for other in dense):
            names.setdefault(id(weight), name)
    unique = {name: weights[name] for name in names.values()}
    everything = {**{f"{number} dense": weight for number, weight in enumerate(dense)}, **unique}
    partly = []
    for group in find_overlaps(everything):
        kept = [name for name in group if name not in unique]
        ranked = sorted(group, key=lambda name: (-everything[name].numel(), not everything[name].requires_grad))
        for name in (name for name in ranked if name in unique):
            weight = unique[name]
            sharing = [everything[other] for other in kept if shares_entries(everything[other], weight)]
            if not sharing:
                kept.append(name)
                continue
            if not any(covers(other, weight) for other in sharing):
                partly.append(name)
            del unique[name]
    return unique, partly
