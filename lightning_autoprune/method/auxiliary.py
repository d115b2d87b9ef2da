r"""The method: auxiliary parameters M beside weights whose storage holds T = W ⊙ h(M). Torch only.

======== ================ ===========================================================================
symbol   shape            meaning
======== ================ ===========================================================================
W        as the weight    latent weights; what the user's optimizer trains
M        as the weight    auxiliary parameters; m > 0 keeps a weight, m <= 0 prunes it
h(M)     as the weight    the mask: 1 where m > 0, else 0; a hard step forward and backward
T        as the weight    W ⊙ h(M): all that the network ever computes with
======== ================ ===========================================================================

Weight step:      dL/dW = dL/dT ⊙ h(M), so that a pruned weight keeps its value and can come back.
Auxiliary step:   m ← m − η · h'(m) · g, where g is what the update rule makes of dL/dT and the pressure μ (``rules``).

The source is Xiao, Wang, Rajasekaran, "AutoPrune: Automatic Network Pruning by Regularizing Auxiliary
Parameters", NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, check_choice, check_range
from lightning_autoprune.method.estimators import Estimator, straight_through
from lightning_autoprune.method.exact_topk import check_count, keep_largest, lift_largest, minimum_counts
from lightning_autoprune.method.initialization import INITIAL_M, InitialM, check_values, initial_m
from lightning_autoprune.method.masked_weights import MaskedWeights, fetch_numbers, latent_weights
from lightning_autoprune.method.update_rules import (
    UPDATE_RULES,
    GradientScale,
    RunningSquares,
    UpdateRule,
    at_least_float32,
    sensitivity,
)
from lightning_autoprune.tensors.bitmasks import pack, unpack
from lightning_autoprune.tensors.flat_buckets import Bucket, split_pieces

__all__ = ["AuxiliaryParameters", "Part"]

Part = tuple[Tensor, Tensor, Tensor, RunningSquares | None]

"""Of some entries the sensitivities, M, and v with what it belongs to (M again, where there is none)."""


class AuxiliaryParameters(MaskedWeights):
    """Auxiliary parameters M for a set of weights, trained to decide which weights to keep.

    Creating it attaches: from then on each weight's storage holds T = W ⊙ h(M), in place, so that the
    network, its ``state_dict`` and its optimizer see plain parameters. Each training step is then::

        aux.mask_gradients()          # after backward, before clipping
        optimizer.step()
        aux.after_weight_step()       # pruned weights are 0 again, their values dormant
        aux.step(dL_dT, lr, mu)       # gradients on a held-out batch
        aux.update_masks()

    Args:
        weights: parameters by layer name; floating point, any shapes.
        initial: ``"magnitude"``: m = ``scale`` · abs(w) / std(w) of its layer: small weights are the
            first to go; ``"constant"``: m = ``scale``. A weight of exactly 0 starts pruned under the former.
        scale: size of the initial m, > 0.
        rule: one of :data:`~lightning_autoprune.method.update_rules.UPDATE_RULES`.
        estimator: the straight-through estimator h'(m), one of ``estimators.ESTIMATORS``.
        leaky_slope: slope of ``"leaky_relu"`` at m <= 0, in [0, 1].
        layer_floor: share of its weights that each layer keeps whatever happens, in [0, 1); at least one.
        decay: weight of the past in the running mean squares, in [0, 1); see ``rules.decay_for``.

    Attributes:
        weights: the parameters, by layer name; their storage holds T.
        dormant: the values of pruned weights, 0 where a weight is kept, so that W = T + dormant (empty once frozen).
        M: auxiliary parameters in at least float32 (empty once frozen).
        kept: number of weights kept in each layer.
        scale: the running root mean square of the sensitivities.
        squares: the running mean square of each weight's own, under the rule ``"adaptive"``: one for each bucket of
            weights (see ``buckets``).
        frozen: whether the masks are final.

    Raises:
        AutoPruneError: for an unknown rule, estimator or initial m, or a number out of its range.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -2.0, 3.0]]))
        >>> aux = AuxiliaryParameters({"layer": layer.weight}, rule="autoprune")
        >>> aux.step([torch.tensor([[1.0, 1.0, -1.0]])], lr=0.1, mu=0.5)  # the loss wants the first smaller
        True
        >>> aux.update_masks()
        >>> layer.weight.data, aux.sparsity
        (tensor([[ 0., -2.,  3.]]), 0.3333333333333333)
    """

    granularity = "weight"  # of what has an m
    M: list[Tensor]
    squares: list[RunningSquares]
    _flat_M: list[Tensor]

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        initial: InitialM = "magnitude",
        scale: float = 0.1,
        rule: UpdateRule = "adaptive",
        estimator: Estimator = "linear",
        leaky_slope: float = 0.1,
        layer_floor: float = 0.001,
        decay: float = 0.999,
    ) -> None:
        check_choice("initial", initial, INITIAL_M)
        check_choice("update_rule", rule, UPDATE_RULES)
        straight_through(estimator, torch.zeros(()))  # raises for an unknown one
        check_range("scale", scale, 0, low_open=True)
        check_range("leaky_slope", leaky_slope, 0, 1)
        check_range("layer_floor", layer_floor, 0, 1, high_open=True)
        check_range("decay", decay, 0, 1, high_open=True)
        self.rule, self.estimator, self.leaky_slope = rule, estimator, leaky_slope
        self.scale = GradientScale(decay)
        super().__init__(weights)
        self._check_values(initial)
        self.floors = minimum_counts(self.totals, layer_floor)
        self._layer_floor = layer_floor
        for M, m in zip(self.M, self._initial_M(initial, scale), strict=True):
            M.copy_(m)
        self.update_masks()

    # The auxiliary step

    def step(self, dL_dT: Sequence[Tensor | None], lr: float, mu: float) -> bool:
        """One auxiliary step by the update rule (see ``rules``). The masks are not updated.

        Args:
            dL_dT: one gradient a weight, in order, pruned entries included; None for one that is not trained now, whose
                M stays as it is.
            lr: η, > 0.
            mu: the pressure μ, >= 0.

        Returns:
            Whether a step was taken: it is not where a gradient is not finite.
        """
        parts = list(self._sensitivities(dL_dT))
        if not parts:
            return True
        norms = fetch_numbers([torch.linalg.vector_norm(G) for G, *_ in parts])
        square, entries = self._over_ranks([math.fsum(n * n for n in norms), float(sum(G.numel() for G, *_ in parts))])
        if not math.isfinite(square):
            return False
        s = self.scale.update(square / entries) or 1.0
        for begun in {id(squares): squares for *_, squares in parts if squares}.values():
            begun.count()
        for G, M, v, squares in parts:
            self._press(G.div_(s), mu)
            if squares:
                squares.normalize(G, v)
            slope = straight_through(self.estimator, M, self.leaky_slope)
            M.sub_(G if slope is None else G.mul_(slope), alpha=lr)
        return True

    def update_masks(self) -> None:
        """Decides anew which weights are kept, and writes T = W ⊙ h(M) into them.

        A layer that would keep fewer than its floor keeps the weights of largest m: they are lifted just above 0.
        """
        self._decide(range(len(self._buckets)), self._flat_M)
        low = [i for i, (kept, floor) in enumerate(zip(self.kept, self.floors, strict=True)) if kept < floor]
        for i in low:
            self._lift(i)
        if low:
            self._decide([k for k, b in enumerate(self._buckets) if set(low) & set(b.numbers)], self._flat_M)

    def meet(self, density: float) -> None:
        """Moves M so that the density is met exactly, up to one weight."""
        self.keep(round(density * self.total))

    def keep(self, count: int) -> None:
        """Moves M so that exactly ``count`` weights are kept: those of largest m, each layer's floor first.

        Equal to one auxiliary step with the pressure that the target asks for.

        Raises:
            AutoPruneError: if ``count`` is less than the layers' floors together, or more than all weights.
        """
        check_count(count, self.totals, self._layer_floor)
        self._keep_best(count)
        self.update_masks()

    def join(self, other: AuxiliaryParameters, names: Sequence[str]) -> None:
        """Takes over other weights, with all that goes with them.

        Args:
            other: of the same rule, neither frozen; not to be used any more.
            names: the order of all weights from now on.
        """
        old = [*self.weights, *other.weights]
        order, count = [old.index(name) for name in names], len(self.weights)

        def in_order(mine: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            both = [*mine, *others]
            return [both[i] for i in order]

        groups = [[order.index(i) for i in bucket.numbers] for bucket in self._buckets]
        groups += [[order.index(count + i) for i in bucket.numbers] for bucket in other._buckets]
        updates = [squares.updates for squares in [*self.squares, *other.squares]]
        entries = [in_order(mine, others) for mine, others in zip(self._entries(), other._entries(), strict=True)]
        self.weights = dict(zip(names, in_order([*self.weights.values()], [*other.weights.values()]), strict=True))
        self.kept, self.totals = in_order(self.kept, other.kept), in_order(self.totals, other.totals)
        self.floors = in_order(self.floors, other.floors)
        self._lay_out_again(groups, entries)
        self._set_updates(updates)

    # The end

    def freeze(self) -> None:
        """Makes the masks final and forgets M and dormant values: pruned weights stay 0, kept ones train on."""
        super().freeze()
        self.M, self._flat_M, self.squares = [], [], []

    def detach(self) -> None:
        """Leaves plain weights T, and no trace of this object in them."""
        self.freeze()
        self.weights, self._final, self.totals, self.floors, self.kept = {}, [], [], [], []

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights T: packed masks, M, dormant weights, the scale."""
        masks = self.masks()
        state: dict[str, Any] = {
            "shapes": {name: tuple(weight.shape) for name, weight in self.weights.items()},
            "frozen": self.frozen,
            "scale": (self.scale.mean_square, self.scale.updates),
            "masks": [pack(mask) for mask in masks],
        }
        if not self.frozen:
            state["buckets"] = [list(bucket.numbers) for bucket in self._buckets]
            state["M"] = [M.clone() for M in self.M]
            state["squares"] = [v.clone() for v in self._v]
            state["updates"] = [squares.updates for squares in self.squares]
            state["dormant"] = [d[~mask] for d, mask in zip(self.dormant, masks, strict=True)]
        return self._to_save(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, on weights that hold the T of the same moment.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes, which are named, or by another rule.
        """
        self._check_granularity(state)
        _check_shapes(state["shapes"], {name: tuple(weight.shape) for name, weight in self.weights.items()})
        if not state["frozen"] and bool(state["updates"]) != bool(self.squares):
            raise AutoPruneError(
                f"The checkpoint's pruning state is of another update rule than {self.rule!r}: resume with the same"
                " `update_rule`, or start from the checkpoint's weights alone."
            )
        state = self._to_load(state)
        self.scale.mean_square, self.scale.updates = state["scale"]
        T = self._effective()
        masks = [unpack(packed, t.shape).to(t.device) for packed, t in zip(state["masks"], T, strict=True)]
        if not state["frozen"]:
            self._lay_out([Bucket(group, T) for group in state["buckets"]])  # sums are taken in the same order
            self._set_updates(state["updates"])
            for new, saved in ((self.M, state["M"]), (self._v, state["squares"])):
                for tensor, value in zip(new, saved, strict=True):
                    tensor.copy_(value)
            for d, mask, values in zip(self.dormant, masks, state["dormant"], strict=True):
                d[~mask] = values.to(d.device, d.dtype)
        for bits, mask in zip(self._bits, masks, strict=True):
            bits.copy_(mask).neg_()
        self.kept = [round(n) for n in self._over_ranks([float(mask.sum()) for mask in masks])]
        if state["frozen"]:
            self.freeze()
        self.after_weight_step()

    # The layout of the state

    def _lay_out(self, buckets: Sequence[Bucket]) -> None:
        super()._lay_out(buckets)
        self._lay_out_M()

    def _entries(self) -> list[list[Tensor]]:
        return [*super()._entries(), self.M, *([self._v] if self._v else [])]

    @property
    def _v(self) -> list[Tensor]:
        return self._views([squares.v for squares in self.squares]) if self.squares else []

    def _set_updates(self, updates: Sequence[int]) -> None:
        for squares, count in zip(self.squares, updates, strict=True):
            squares.updates = count

    def _with_gradients(self, dL_dT: Sequence[Tensor | None]) -> list[int]:
        """The numbers of the buckets all of whose weights have gradients; those with some are made two."""
        has = [gradient is not None for gradient in dL_dT]
        groups = [[i for i in b.numbers if has[i] is given] for b in self._buckets for given in (True, False)]
        if sum(map(bool, groups)) > len(self._buckets):
            updates = [squares.updates for squares in self.squares for _ in range(2)]
            chosen = [j for j, group in enumerate(groups) if group]
            self._lay_out_again([groups[j] for j in chosen], self._entries())
            self._set_updates([updates[j] for j in chosen] if updates else [])
        return [k for k, bucket in enumerate(self._buckets) if has[bucket.numbers[0]]]

    # What differs where M is not one entry a weight, or where weights are sharded

    def _lift(self, i: int) -> None:
        lift_largest(self.M[i], self.floors[i])

    def _keep_best(self, count: int) -> None:
        keep_largest(self.M, self.floors, count)

    def _check_values(self, initial: InitialM) -> None:
        for name, T in zip(self.weights, self._effective(), strict=True):
            check_values(name, T, initial)

    def _check_granularity(self, state: Mapping[str, Any]) -> None:
        there = "neuron" if "alive" in state else "weight"
        if there != self.granularity:
            raise AutoPruneError(
                f'The checkpoint\'s run pruned {there}s, and this callback has `granularity="{self.granularity}"`:'
                " resume with the same granularity, or start from the checkpoint's weights alone."
            )

    def _to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def _to_load(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state

    def _initial_M(self, initial: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        return [initial_m(T, initial, scale) for T in self._effective()]

    def _lay_out_M(self) -> None:  # noqa: N802
        self._flat_M = [torch.zeros_like(at_least_float32(flat)) for flat in self._flat_dormant]
        self.M = self._views(self._flat_M)
        self.squares = [RunningSquares(M, self.scale.decay) for M in self._flat_M] if self.rule == "adaptive" else []

    def _sensitivities(self, dL_dT: Sequence[Tensor | None]) -> Iterator[Part]:
        """The loss's part of dL/dm, without h'(m), in pieces, with what goes with them."""
        which, effective = self._with_gradients(dL_dT), self._effective()
        for k in which:
            bucket, M, squares = self._buckets[k], self._flat_M[k], self.squares[k] if self.squares else None
            flat = bucket.flatten(dL_dT), bucket.flatten(effective), self._flat_bits[k], self._flat_dormant[k]  # type: ignore[arg-type]
            for g, t, bits, dormant, m, v in split_pieces(*flat, M, squares.v if squares else M):
                yield sensitivity(g, latent_weights(t, bits, dormant), self.rule), m, v, squares

    def _press(self, G: Tensor, mu: float) -> None:
        G.add_(mu)


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
