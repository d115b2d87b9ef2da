"""Find out which trained matrices of a model stay dense, and how they can be pruned too. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from lightning_autoprune.model.name_patterns import collapse_numbers, find_patterns
from lightning_autoprune.model.prunable_layers import WeightChoice, matches, without_shared_memory
from lightning_autoprune.model.weight_places import WeightKind

__all__ = ["DenseMatrices", "IsTrained", "find_adapted_layers", "find_dense_matrices"]

_LARGE_SHARE = 0.05  # of the entries of trained matrices; less may stay dense without a word

_MOST_GROUPS = 5

IsTrained: TypeAlias = Callable[[nn.Parameter], bool]


@dataclass(frozen=True)
class DenseMatrices:
    """Trained matrices that stay dense.

    Attributes:
        share: their share of the entries of all trained matrices, in [0, 1].
        largest: the shares of the largest bare ones, by name, with "*" for numbers in the names; empty if the share of
            all is at most 5%.
        patterns: what to pass as ``include`` to prune the largest too, beside what is pruned anyway.
    """

    share: float
    largest: dict[str, float]
    patterns: list[str]

    @property
    def is_large(self) -> bool:
        """True if more than 5% of the entries stay dense."""
        return self.share > _LARGE_SHARE


def find_dense_matrices(choice: WeightChoice, is_trained: IsTrained, exclude: Sequence[str] | None) -> DenseMatrices:
    """Find the trained matrices that are not chosen to be pruned.

    Embeddings, biases, normalizations and what the user excludes do not count. Memory that several parameters share
    counts once.

    Args:
        choice: which weights are pruned.
        is_trained: tells whether a parameter is trained.
        exclude: patterns of what the user leaves dense, or None.
    """
    sizes = _trained_sizes(choice, is_trained, exclude or ())
    dense = {name: size for name, size in sizes.items() if name not in choice.weights}
    total = max(sum(sizes.values()), 1)
    shares = {n: size / total for n, size in dense.items() if choice.places[n].kind is WeightKind.BARE}
    share = sum(dense.values()) / total
    groups = _largest_groups(shares) if share > _LARGE_SHARE else {}
    largest = {group: sum(shares[name] for name in names) for group, names in groups.items()}
    added = {name for names in groups.values() for name in names}
    wanted = [name for name in choice.places if name in choice.weights or name in added]
    others = (WeightKind.EMBEDDING, WeightKind.BARE)  # only a pattern that matches nothing else takes in other kinds
    unwanted = {n: place for n, place in choice.places.items() if place.kind in others and n not in wanted}
    names = [*unwanted, *(place.parameter_name for place in unwanted.values())]
    return DenseMatrices(share, largest, find_patterns(wanted, names) if largest else [])


def _trained_sizes(choice: WeightChoice, is_trained: IsTrained, exclude: Sequence[str]) -> dict[str, int]:
    """Return the number of entries of each trained matrix that counts, by the name of its place; chosen ones first."""
    counted = (WeightKind.LAYER, WeightKind.BARE, WeightKind.INGREDIENT)
    matrices, embeddings = dict(choice.weights), []
    for name, place in choice.places.items():
        parameter = place.parameter
        if name in matrices or parameter is None or place.obstacle or not parameter.is_floating_point():
            continue
        owner = choice.places.get(place.owner, place)
        if place.kind is WeightKind.EMBEDDING:
            embeddings.append(parameter)
        elif place.kind in counted and not matches(name, place, exclude) and not matches(place.owner, owner, exclude):
            matrices[name] = parameter
    trained = {name: weight for name, weight in matrices.items() if is_trained(weight)}
    return {name: weight.numel() for name, weight in without_shared_memory(trained, embeddings)[0].items()}


def _largest_groups(shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Return the names of the largest weights, grouped by what is the same but for numbers in the names."""
    groups: dict[str, list[str]] = {}
    for name in shares:
        groups.setdefault(collapse_numbers(name), []).append(name)
    rest, largest = sum(shares.values()), {}
    for group in sorted(groups, key=lambda group: -sum(shares[name] for name in groups[group]))[:_MOST_GROUPS]:
        if rest > _LARGE_SHARE:
            largest[group] = groups[group]
            rest -= sum(shares[name] for name in groups[group])
    return largest


def find_adapted_layers(
    model: nn.Module, weights: Mapping[str, nn.Parameter], is_trained: IsTrained
) -> dict[str, nn.Parameter]:
    """Find frozen weights that have an adapter, to be merged into them later (LoRA).

    An adapter is a pair of trained matrices in the same layer, or in the module around it, whose product has the shape
    of the weight.

    Args:
        model: the model.
        weights: those to look at, by layer name.
        is_trained: tells whether a parameter is trained.
    """
    frozen = {id(weight): name for name, weight in weights.items() if not is_trained(weight)}
    adapted: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not path or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        near = [*module.children(), module]
        own = [p for layer in near for p in layer._parameters.values() if p is not None and id(p) in frozen]
        trained = [p for p in module.parameters() if own and p.dim() > 1 and is_trained(p)]
        adapted |= {frozen[id(weight)]: weight for weight in own if _has_adapter(weight, trained)}
    return adapted


def _has_adapter(weight: nn.Parameter, trained: Sequence[nn.Parameter]) -> bool:
    """Return True if the product of two trained matrices has the shape of a weight, or of its transpose."""
    sides = {weight.shape[0], weight.shape[1]}
    return any(
        down.shape[0] == up.shape[1] < min(sides) and {down.shape[1], up.shape[0]} == sides
        for down in trained
        for up in trained
    )
