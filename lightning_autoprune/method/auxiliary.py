r"""The method: auxiliary parameters M beside weights whose storage holds T = W ⊙ h(M). Torch only.

======== ================ ===========================================================================
symbol   shape            meaning
======== ================ ===========================================================================
W        as the weight    latent weights; what the user's optimizer trains
M        as the weight    auxiliary parameters; m > 0 keeps a weight, m <= 0 prunes it
h(M)     as the weight    the mask: 1 where m > 0, else 0; a hard step forward and backward
T        as the weight    W ⊙ h(M): the only weights that the network computes with
======== ================ ===========================================================================

Weight step:      dL/dW = dL/dT ⊙ h(M), so that a pruned weight keeps its value and can come back.
Auxiliary step:   m ← m − η · h'(m) · g, where the update rule makes g from dL/dT and the pressure μ (``update_rules``).

The source is Xiao, Wang, Rajasekaran, "AutoPrune: Automatic Network Pruning by Regularizing Auxiliary
Parameters", NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, check_range
from lightning_autoprune.method.estimators import Estimator, EstimatorName, straight_through
from lightning_autoprune.method.exact_topk import check_count
from lightning_autoprune.method.granularity import Granularity, WeightGranularity
from lightning_autoprune.method.granularity.base import StepPiece
from lightning_autoprune.method.initialization import InitialM
from lightning_autoprune.method.masked_weights import MaskedWeights, fetch_numbers
from lightning_autoprune.method.registry import describe
from lightning_autoprune.method.saved_state import restore_state, save_state
from lightning_autoprune.method.settings import check_setting
from lightning_autoprune.method.update_rules import (
    GradientScale,
    SparseGradientRule,
    UpdateRule,
    UpdateRuleName,
    make_rule,
)
from lightning_autoprune.tensors.flat_buckets import Bucket

__all__ = ["AuxiliaryParameters"]


class AuxiliaryParameters(MaskedWeights):
    """Auxiliary parameters M for a set of weights, trained to decide which weights to keep.

    Creating an instance attaches it: from then on each weight's storage holds T = W ⊙ h(M), in place. The network, its
    ``state_dict`` and its optimizer see plain parameters. Each training step is then::

        aux.before_forward()          # needed with neurons only
        loss(...).backward()
        aux.mask_gradients()          # before clipping
        optimizer.step()
        aux.after_weight_step()       # pruned weights are 0 again, their values dormant
        aux.step(dL_dT, lr, mu)       # gradients on a held-out batch
        aux.update_masks()

    Under FSDP2, weights are sharded. Then ``M``, ``W``, ``dormant`` and ``masks()`` are this rank's shards, and all
    methods are called on all ranks; numbers and ``state_dict()`` refer to whole layers.

    Args:
        weights: parameters by layer name; floating point, any shapes.
        granularity: which units have an m. None: each weight.
        initial_m: ``"fisher"``: m = ``initial_scale`` · S / root mean square of S over all layers, with the saliency
            S = abs(w) · ⁴√F (see ``fisher.saliency``), so that the weights that matter least are the first to be
            pruned; ``"magnitude"``: m = ``initial_scale`` · abs(w) / std(w) of its layer; ``"constant"``:
            m = ``initial_scale``. With the first two, a weight of exactly 0 starts pruned, except in a layer whose
            weights are all 0 or not all finite, which starts at the constant with a warning. Units of several weights
            start by magnitude under ``"fisher"``. None: no weight is written until ``load_state_dict`` restores a
            state.
        initial_scale: size of the initial m, > 0.
        update_rule: a name in ``update_rules.UPDATE_RULES``, or an instance of an ``UpdateRule``.
        estimator: the straight-through estimator h'(m): a name in ``estimators.ESTIMATORS``, or a function of M.
        leaky_slope: slope of ``"leaky_relu"`` at m <= 0, in [0, 1].
        layer_floor: fraction of its weights, or other units, that each layer always keeps, in [0, 1); at least one.
        decay: weight of the past in the running mean squares, in [0, 1); see ``UpdateRule.decay``.
        fisher: F, the mean square of each weight's gradient before pruning, by layer name; its tensors have the shapes
            of the (local) weights. A layer that is missing has the mean of the others; if all are missing, F is 1.

    Attributes:
        weights: the parameters, by layer name; their storage holds T.
        dormant: the values of pruned weights, -0.0 where a weight is kept, so that W = T + dormant (empty once masks
            are final).
        M: auxiliary parameters in at least float32 (empty once masks are final).
        kept: number of weights kept in each layer.
        floors: number of weights, or other units, that each layer always keeps.
        scale: the running root mean square of the sensitivities.
        rule: the update rule.
        rule_name: its name, or the name of the user's own class.
        averages: the rule's running averages, by name, in the shapes of ``M``.
        updates: number of auxiliary steps of each bucket of layers.
        threshold: θ of the masks h(M - θ); 0 but for :meth:`approach`.
        masks_final: True once the masks do not change any more.

    Raises:
        AutoPruneError: for an unknown rule, estimator or initial m, or a number out of its range.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.1, -2.0, 3.0]]))
        >>> aux = AuxiliaryParameters({"layer": layer.weight}, update_rule="autoprune")
        >>> aux.step([torch.tensor([[1.0, 1.0, -1.0]])], lr=0.1, mu=0.5)  # the loss wants the first to shrink
        True
        >>> aux.update_masks()
        >>> layer.weight.data, aux.sparsity
        (tensor([[ 0., -2.,  3.]]), 0.3333333333333333)
    """

    M: list[Tensor]
    flat_M: list[Tensor]
    averages: dict[str, list[Tensor]]
    updates: list[int]
    _flat_averages: dict[str, list[Tensor]]

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        granularity: Granularity | None = None,
        initial_m: InitialM | None = "fisher",
        initial_scale: float = 0.1,
        update_rule: UpdateRuleName | UpdateRule = "adaptive",
        estimator: EstimatorName | Estimator = "linear",
        leaky_slope: float = 0.1,
        layer_floor: float = 0.001,
        decay: float = 0.999,
        fisher: Mapping[str, Tensor] | None = None,
    ) -> None:
        if initial_m is not None:
            check_setting("initial_m", initial_m)
        check_setting("initial_scale", initial_scale)
        check_setting("update_rule", update_rule)
        check_setting("estimator", estimator)
        check_setting("leaky_slope", leaky_slope)
        check_setting("layer_floor", layer_floor)
        check_range("decay", decay, 0, 1, high_open=True)
        self.granularity = granularity or WeightGranularity()
        self.rule, self.rule_name = make_rule(update_rule), describe(update_rule)
        self.estimator, self.leaky_slope = estimator, leaky_slope
        self.scale = GradientScale(decay)
        self._layer_floor, self.threshold = layer_floor, 0.0
        self.granularity.check_sharding(weights)
        super().__init__(weights)
        self.floors = self.granularity.floors(self.weights, layer_floor)
        self._make_M()
        if initial_m is not None:
            known = [(fisher or {}).get(name) for name in self.weights]
            starting = self.granularity.initial_M(self, initial_m, initial_scale, known)
            for M, m in zip(self.M, starting, strict=True):
                M.copy_(m)
            self.update_masks()

    @property
    def density(self) -> float:
        """Fraction that a target refers to, in (0, 1]: of kept weights, or of the cost that remains."""
        return self.granularity.density(self)

    @property
    def sparsity(self) -> float:
        """Fraction of prunable weights that are pruned, in [0, 1)."""
        return self.granularity.sparsity(self)

    def density_of(self, layers: Sequence[int]) -> float:
        """Return the fraction of their weights that some layers keep together, given their numbers.

        With neurons, whose layers depend on each other, it is the :attr:`density` of all layers.
        """
        return self.granularity.density_of(self, layers)

    def layer_sparsity(self) -> dict[str, float]:
        """Return the fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return self.granularity.layer_sparsity(self)

    # The auxiliary step

    def before_forward(self) -> None:
        """Prepare the weights for forward and backward passes whose gradients M follows; needed with neurons only.

        The weights that produce pruned channels have values in these passes, which change no output. Afterwards
        :meth:`after_weight_step` or :meth:`update_masks` sets them back to 0.
        """
        if not self.masks_final:
            self.granularity.before_forward(self)

    def step(self, dL_dT: Sequence[Tensor | None], lr: float, mu: float) -> bool:
        """Take one auxiliary step by the update rule (see ``update_rules``). The masks are not updated.

        Args:
            dL_dT: one gradient per weight, in order, pruned entries included. None for a weight that is not trained
                now, whose M stays unchanged.
            lr: η, > 0.
            mu: the pressure μ, >= 0.

        Returns:
            False if a gradient is not finite, in which case no step was taken.
        """
        pieces, mean_square = self._sensitivities(dL_dT, self.rule)
        if not math.isfinite(mean_square):  # a layer that the loss does not use may hold anything, NaN included
            pieces, mean_square = self._sensitivities(dL_dT, SparseGradientRule(self.rule))
        if not pieces:
            return True
        if not math.isfinite(mean_square):
            return False
        s = self.scale.update(mean_square) or 1.0
        for k in {piece.bucket for piece in pieces}:
            self.updates[k] += 1
        for G, k, span in pieces:
            M = self.flat_M[k][span]
            state = {name: flat[k][span] for name, flat in self._flat_averages.items()}
            g0 = self.granularity.add_pressure(G.div_(s), mu)
            g = self.rule.direction(g0, state, self.updates[k], self.scale.decay)
            slope = straight_through(self.estimator, M, self.leaky_slope)
            M.sub_(g if slope is None else g * slope, alpha=lr)
        return True

    def _sensitivities(self, dL_dT: Sequence[Tensor | None], rule: UpdateRule) -> tuple[list[StepPiece], float]:
        """Return the sensitivities by a rule, in pieces, and their mean square; 0 if there are none."""
        pieces = list(self.granularity.sensitivities(self, dL_dT, rule))
        return pieces, self._mean_square([piece.G for piece in pieces]) if pieces else 0.0

    def _mean_square(self, sensitivities: Sequence[Tensor]) -> float:
        """Return the mean square of sensitivities over all entries of M, those of other ranks included."""
        norms = fetch_numbers([torch.linalg.vector_norm(G) for G in sensitivities])
        sums = [math.fsum(n * n for n in norms), float(sum(G.numel() for G in sensitivities))]
        square, entries = sums if self.granularity.replicated else self.placement.sum(sums)
        return square / entries

    def update_masks(self) -> None:
        """Decide anew which weights are kept, and write T = W ⊙ h(M) into them.

        A layer that would keep fewer than its floor keeps those with the largest m, which are raised just above 0.
        """
        self.threshold = 0.0
        self.granularity.update_masks(self)

    def absorb_threshold(self) -> None:
        """Take the threshold of the masks off all M, so that the next masks are those of now but for the steps."""
        if self.threshold:
            for M in self.flat_M:
                M.sub_(self.threshold)
        self.threshold = 0.0

    def approach(self, density: float, layers: Sequence[int], share: float = 1.0) -> None:
        """Let the masks meet a density within 0.2% until the next update: they are h(M - θ) with a common threshold θ.

        Units of several weights are left to the pressure.

        Args:
            density: fraction of their weights that the layers should keep together.
            layers: numbers of the layers whose masks are h(M - θ).
            share: how much of θ is taken off their M for good, in [0, 1].
        """
        self.granularity.approach(self, density, layers, share)

    def meet(self, density: float) -> None:
        """Move M so that the density is met: exactly with single weights, else as closely as possible from below."""
        self.granularity.meet(self, density)

    def keep(self, count: int) -> None:
        """Move M so that exactly ``count`` weights are kept: those with the largest m, each layer's floor first.

        Raises:
            AutoPruneError: if ``count`` is below the sum of the layers' floors or above the number of weights, or if
                the granularity is not single weights.
        """
        if not isinstance(self.granularity, WeightGranularity):
            raise AutoPruneError(
                f'`keep` counts single weights, and the granularity is "{self.granularity.name}": use `meet(density)`.'
            )
        check_count(count, self.totals, self._layer_floor)
        self.granularity.keep(self, count)

    # The end

    def finalize_masks(self) -> None:
        """Make the masks final and forget M and dormant values: pruned weights stay 0, kept ones train on."""
        self.forget()

    def forget(self) -> None:
        """Keep the masks as they are, and forget M and dormant values."""
        self._finalize()
        self.M, self.flat_M, self.averages, self._flat_averages, self.updates = [], [], {}, {}, []

    def detach(self) -> None:
        """Leave plain weights T, and no trace of this object in them."""
        self.finalize_masks()
        self.weights, self._final, self.totals, self.floors, self.kept = {}, [], [], [], []

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return all that resuming needs besides the weights T: packed masks, M, dormant weights, running averages."""
        return save_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, on weights that hold the T of the same step.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes (which are named), by another granularity,
                or by a rule with other running averages.
        """
        restore_state(self, state)

    # The layout of the state

    def _make_M(self) -> None:  # noqa: N802
        self.flat_M = self.granularity.make_M(self)
        self._flat_averages = {name: [torch.zeros_like(M) for M in self.flat_M] for name in self.rule.state_names}
        self.updates = [0] * len(self.flat_M)
        self.M = self.granularity.views(self, self.flat_M)
        self.averages = {name: self.granularity.views(self, flat) for name, flat in self._flat_averages.items()}

    def lay_out(self, groups: Sequence[Sequence[int]], updates: Sequence[int]) -> None:
        """Make a new state in buckets: all weights are kept, and M and the running averages are 0.

        Args:
            groups: the numbers of the layers of each bucket.
            updates: the number of auxiliary steps of each bucket.
        """
        T = self.effective()
        self._make_state([Bucket(group, T) for group in groups])
        self._make_M()
        self.updates = list(updates)

    def join(self, other: AuxiliaryParameters, names: Sequence[str]) -> None:
        """Merge another instance into this one: its weights, M, masks, dormant values and running averages.

        Args:
            other: of the same granularity and rule; neither has final masks. It must not be used afterwards.
            names: the order of all weights from now on.
        """
        self.absorb_threshold()
        other.absorb_threshold()
        old = [*self.weights, *other.weights]
        order, count = [old.index(name) for name in names], len(self.weights)

        def in_order(mine: Sequence[Any], others: Sequence[Any]) -> list[Any]:
            both = [*mine, *others]
            return [both[i] for i in order]

        groups = [[order.index(i) for i in bucket.numbers] for bucket in self.buckets]
        groups += [[order.index(count + i) for i in bucket.numbers] for bucket in other.buckets]
        updates = [*self.updates, *other.updates]
        entries = [in_order(mine, others) for mine, others in zip(self._entries(), other._entries(), strict=True)]
        self.weights = dict(zip(names, in_order([*self.weights.values()], [*other.weights.values()]), strict=True))
        self.kept, self.totals = in_order(self.kept, other.kept), in_order(self.totals, other.totals)
        self.floors = self.granularity.floors(self.weights, self._layer_floor)
        self._lay_out_again(groups, updates, entries)

    def trained_buckets(self, dL_dT: Sequence[Tensor | None]) -> list[int]:
        """Return the numbers of the buckets whose weights all have gradients, after splitting mixed buckets."""
        has = [gradient is not None for gradient in dL_dT]
        groups = [[i for i in b.numbers if has[i] is trained] for b in self.buckets for trained in (True, False)]
        if sum(map(bool, groups)) > len(self.buckets):
            updates = [count for count in self.updates for _ in range(2)]
            filled = [j for j, group in enumerate(groups) if group]
            self._lay_out_again([groups[j] for j in filled], [updates[j] for j in filled], self._entries())
        return [k for k, bucket in enumerate(self.buckets) if has[bucket.numbers[0]]]

    def _entries(self) -> list[list[Tensor]]:
        """Return the state that is laid out in buckets: lists of one tensor per layer."""
        return [self.dormant, self.M, *self.averages.values()]

    def _lay_out_again(
        self, groups: Sequence[Sequence[int]], updates: Sequence[int], entries: Sequence[Sequence[Tensor]]
    ) -> None:
        """Put the state into other buckets.

        Args:
            groups: the numbers of the layers of each bucket.
            updates: the number of auxiliary steps of each bucket.
            entries: the state, as :meth:`_entries` returns it.
        """
        self.lay_out(groups, updates)
        for new, old in zip(self._entries(), entries, strict=True):
            torch._foreach_copy_(new, list(old))
