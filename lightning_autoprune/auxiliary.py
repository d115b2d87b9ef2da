r"""The method: auxiliary parameters M beside weights whose storage holds T = W ⊙ h(M). Torch only.

======== ================ ===========================================================================
symbol   shape            meaning
======== ================ ===========================================================================
W        as the weight    latent weights; what the user's optimiser trains
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
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_autoprune.errors import AutoPruneError, check_choice, check_range
from lightning_autoprune.estimators import Estimator, straight_through
from lightning_autoprune.masks import (
    PackedMask,
    as_bits,
    check_count,
    clear,
    decide,
    floors,
    keep_best,
    pack,
    packed_if_large,
    unpack,
)
from lightning_autoprune.pressure import GradientScale
from lightning_autoprune.rules import UPDATE_RULES, RunningSquares, UpdateRule, at_least_float32, sensitivity
from lightning_autoprune.shards import part

__all__ = ["INITIAL_M", "AuxiliaryParameters", "InitialM", "check_values", "initial_m", "latent", "write"]

InitialM = Literal["magnitude", "constant"]
INITIAL_M: tuple[InitialM, ...] = get_args(InitialM)


class AuxiliaryParameters:
    """Auxiliary parameters M for a set of weights, trained to decide which weights to keep.

    Creating it attaches: from then on each weight's storage holds T = W ⊙ h(M), in place, so that the
    network, its ``state_dict`` and its optimiser see plain parameters. Each training step is then::

        aux.mask_gradients()          # after backward, before clipping
        optimizer.step()
        aux.after_weight_step()       # pruned weights are 0 again, their values dormant
        aux.step(dL_dT, lr, mu)       # gradients on a held-out batch
        aux.update_masks()

    Args:
        weights: parameters by layer name; floating point, any shapes.
        initial: ``"magnitude"``: m = ``scale`` · abs(w) / std(w) of its layer (it matters: small weights are
            the first to go); ``"constant"``: m = ``scale``. A weight of exactly 0 starts pruned under the former.
        scale: size of the initial m, > 0.
        rule: one of :data:`~lightning_autoprune.rules.UPDATE_RULES`.
        estimator: the straight-through estimator h'(m), one of :data:`~lightning_autoprune.estimators.ESTIMATORS`.
        leaky_slope: slope of ``"leaky_relu"`` at m <= 0, in [0, 1].
        layer_floor: share of its weights that each layer keeps whatever happens, in [0, 1); at least one.

    Attributes:
        weights: the parameters, by layer name; their storage holds T.
        dormant: the values of pruned weights, 0 where a weight is kept, so that W = T + dormant (empty once frozen).
        M: auxiliary parameters in at least float32 (empty once frozen).
        kept: number of weights kept in each layer.
        scale: the running root mean square of the sensitivities.
        squares: the running mean square of each weight's own, under the rule ``"adaptive"``.
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
    ) -> None:
        check_choice("initial", initial, INITIAL_M)
        check_choice("update_rule", rule, UPDATE_RULES)
        straight_through(estimator, torch.zeros(()))  # raises for an unknown one
        check_range("scale", scale, 0, low_open=True)
        check_range("leaky_slope", leaky_slope, 0, 1)
        check_range("layer_floor", layer_floor, 0, 1, high_open=True)
        self.weights = dict(weights)
        self.rule, self.estimator, self.leaky_slope = rule, estimator, leaky_slope
        self.scale = GradientScale()
        self.frozen = False
        self.totals = [weight.numel() for weight in self.weights.values()]
        self.floors = floors(self.totals, layer_floor)
        self._layer_floor = layer_floor
        T = self._effective()
        self._check_values(initial)
        self.dormant = [torch.zeros_like(t) for t in T]
        self.M = self._initial_M(initial, scale)
        self.squares = RunningSquares(self.M) if rule == "adaptive" else None
        self._bits = [torch.full_like(as_bits(t), -1) for t in T]
        self._final: list[Tensor | PackedMask] = []  # what the bits become once they are frozen
        self.kept = list(self.totals)
        self.update_masks()

    @property
    def W(self) -> list[Tensor]:  # noqa: N802
        """Latent weights, new tensors: kept ones as they are now, pruned ones as they went. Empty once frozen."""
        parts = zip(self._effective(), self._bits, self.dormant, strict=False)
        return [latent(T, bits, dormant) for T, bits, dormant in parts]

    # Sizes

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(self.totals)

    @property
    def density(self) -> float:
        """Fraction of prunable weights kept, in (0, 1]."""
        return sum(self.kept) / self.total

    @property
    def sparsity(self) -> float:
        """Fraction of prunable weights that are pruned, in [0, 1)."""
        return (self.total - sum(self.kept)) / self.total

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction of each layer's weights that are pruned, in [0, 1), by layer name."""
        return {name: (n - k) / n for name, k, n in zip(self.weights, self.kept, self.totals, strict=True)}

    def masks(self) -> list[Tensor]:
        """h(M) as bool tensors, True where a weight is kept."""
        return [mask.bool() for mask in self._final or self._bits]

    # The weight step

    def mask_gradients(self) -> None:
        """Turns each weight's gradient dL/dT into dL/dW = dL/dT ⊙ h(M), in place."""
        for weight, mask in zip(self.weights.values(), self._final or self._bits, strict=True):
            if weight.grad is not None:
                clear(part(weight.grad), mask)

    def after_weight_step(self) -> None:
        """Sets pruned entries of T back to 0, which momentum and decay may have moved."""
        for T, mask in zip(self._effective(), self._final or self._bits, strict=True):
            clear(T, mask)

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
        which, G = self._sensitivity(dL_dT)
        if not G:
            return True
        M = [self.M[i] for i in which]
        mean_square = self._mean_square(G, which)
        if not math.isfinite(mean_square):
            return False
        torch._foreach_div_(G, self.scale.update(mean_square) or 1.0)
        self._press(G, mu)
        if self.squares:
            self.squares.normalise(G, which)
        for g, m in zip(G, M, strict=True):
            slope = straight_through(self.estimator, m, self.leaky_slope)
            if slope is not None:
                g.mul_(slope)
        torch._foreach_add_(M, G, alpha=-lr)
        return True

    def update_masks(self) -> None:
        """Decides anew which weights are kept, and writes T = W ⊙ h(M) into them.

        A layer that would keep fewer than its floor keeps the weights of largest m: they are lifted just above 0.
        """
        parts = zip(self._effective(), self.dormant, self.M, self._bits, strict=True)
        for i, (T, dormant, M, bits) in enumerate(parts):
            W = latent(T, bits, dormant)
            self.kept[i] = decide(M, bits)
            if self._too_few(i):
                keep_best([M], [self.floors[i]], self.floors[i], prune=False)
                self.kept[i] = decide(M, bits)
            write(T, dormant, bits, W)

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
        keep_best(self.M, self.floors, count)
        self.update_masks()

    def join(self, other: AuxiliaryParameters, names: Sequence[str]) -> None:
        """Takes over other weights, with all that goes with them.

        Args:
            other: of the same rule, neither frozen; not to be used any more.
            names: the order of all weights from now on.
        """
        places = {name: (part, i) for part in (self, other) for i, name in enumerate(part.weights)}
        order = [places[name] for name in names]
        self.weights = {name: part.weights[name] for name, (part, _) in zip(names, order, strict=True)}
        if self.squares:
            v = [(part.squares.v[i], part.squares.updates[i]) for part, i in order if part.squares]
            self.squares.v, self.squares.updates = [x for x, _ in v], [n for _, n in v]
        for attribute in ("totals", "floors", "kept", "dormant", "M", "_bits"):
            setattr(self, attribute, [getattr(part, attribute)[i] for part, i in order])

    # The end

    def freeze(self) -> None:
        """Makes the masks final and forgets M and dormant values: pruned weights stay 0, kept ones train on."""
        self.dormant, self.M, self.squares, self.frozen = [], [], None, True
        if self._bits:
            self._final, self._bits = [packed_if_large(bits) for bits in self._bits], []

    def detach(self) -> None:
        """Leaves plain weights T, and no trace of this object in them."""
        self.freeze()
        self.weights, self._final, self.totals, self.floors, self.kept = {}, [], [], [], []

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs beside the weights T: packed masks, M, dormant weights, the scale."""
        state: dict[str, Any] = {
            "shapes": {name: tuple(weight.shape) for name, weight in self.weights.items()},
            "frozen": self.frozen,
            "scale": (self.scale.mean_square, self.scale.updates),
            "masks": [pack(mask) for mask in self.masks()],
        }
        if not self.frozen:
            state["M"] = [M.clone() for M in self.M]
            state["squares"] = self.squares.state_dict() if self.squares else None
            state["dormant"] = [d[~mask] for d, mask in zip(self.dormant, self.masks(), strict=True)]
        return self._to_save(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave, on weights that hold the T of the same moment.

        Raises:
            AutoPruneError: if the state was made for other layers or shapes; names them.
        """
        _check_shapes(state["shapes"], {name: tuple(weight.shape) for name, weight in self.weights.items()})
        state = self._to_load(state)
        self.scale.mean_square, self.scale.updates = state["scale"]
        T = self._effective()
        masks = [unpack(packed, t.shape).to(t.device) for packed, t in zip(state["masks"], T, strict=True)]
        for bits, mask in zip(self._bits, masks, strict=True):
            bits.copy_(mask).neg_()
        self.kept = [int(mask.sum()) for mask in masks]
        if state["frozen"]:
            self.freeze()
        else:
            self.M = [saved.to(m.device, copy=True) for saved, m in zip(state["M"], self.M, strict=True)]
            if self.squares:
                self.squares.load_state_dict(state["squares"])
            for d, mask, values in zip(self.dormant, masks, state["dormant"], strict=True):
                d.zero_()[~mask] = values.to(d.device, d.dtype)
        self.after_weight_step()

    # What differs where M is not one entry a weight, or where weights are sharded

    def _check_values(self, initial: InitialM) -> None:
        for name, T in zip(self.weights, self._effective(), strict=True):
            check_values(name, T, initial)

    def _initial_M(self, initial: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        return [initial_m(T, initial, scale) for T in self._effective()]

    def _sensitivity(self, dL_dT: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
        """The numbers of the M that the gradients say something of, and what they say."""
        which = [i for i, gradient in enumerate(dL_dT) if gradient is not None]
        W = self.W
        return which, sensitivity([g for g in dL_dT if g is not None], [W[i] for i in which], self.rule)

    def _press(self, G: list[Tensor], mu: float) -> None:
        torch._foreach_add_(G, mu)

    def _mean_square(self, G: Sequence[Tensor], which: Sequence[int]) -> float:
        return float(torch.stack(torch._foreach_norm(list(G))).square().sum()) / sum(g.numel() for g in G)

    def _too_few(self, i: int) -> bool:
        return self.kept[i] < self.floors[i]

    def _to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def _to_load(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state

    def _effective(self) -> list[Tensor]:
        return [part(weight) for weight in self.weights.values()]


def write(T: Tensor, dormant: Tensor, bits: Tensor, W: Tensor) -> None:
    """Writes T = W ⊙ h(M), and what it does not have of W into the dormant values."""
    t = torch.bitwise_and(as_bits(W), bits, out=as_bits(T))
    torch.bitwise_xor(as_bits(W), t, out=as_bits(dormant))


def latent(T: Tensor, bits: Tensor, dormant: Tensor) -> Tensor:
    """W as a new tensor: T where kept (whoever wrote it), the dormant value where pruned."""
    return (as_bits(T) & bits).bitwise_or_(as_bits(dormant)).view(T.dtype)


def initial_m(T: Tensor, initial: InitialM, scale: float) -> Tensor:
    """The m that a layer starts with."""
    wide = at_least_float32(T)
    if initial == "constant":
        return torch.full_like(wide, scale)
    largest = wide.abs().max()
    std = wide.std() if wide.numel() > 1 else largest
    return wide.abs() * (scale / torch.where(std > 1e-6 * largest, std, largest))  # equal weights have no spread


def check_values(name: str, T: Tensor, initial: InitialM) -> None:
    """Raises if a layer's weights give no M to start with."""
    if not T.isfinite().all():
        raise AutoPruneError(f"Layer {name!r} has weights that are not finite: the training has diverged.")
    if initial == "magnitude" and T.count_nonzero() == 0:
        raise AutoPruneError(
            f"All weights of layer {name!r} are 0, so their magnitude says nothing of what to keep: start later"
            ' (`warmup`), exclude the layer, or use `initial_m="constant"`.'
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
