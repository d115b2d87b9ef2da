"""One auxiliary parameter m per weight. Torch only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_autoprune.method.exact_topk import check_count, minimum_counts, threshold_near
from lightning_autoprune.method.fisher import saliency
from lightning_autoprune.method.granularity.base import Granularity, StepPiece, sensitivity
from lightning_autoprune.method.initialization import InitialM, initial_m, warn_of_constant
from lightning_autoprune.method.masked_weights import fetch_numbers
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.flat_buckets import split_pieces

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["WeightGranularity"]


class WeightGranularity(Granularity):
    """Single weights: M has the shape of W, and lies in buckets as W does, entry by entry."""

    name = "weight"
    prunes_single_weights = True

    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return one flat tensor of zeros per bucket, as large as the bucket."""
        return [torch.zeros_like(at_least_float32(flat)) for flat in aux.flat_dormant]

    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per layer, in the layer's shape."""
        return aux.views(flat)

    def initial_M(  # noqa: N802
        self, aux: AuxiliaryParameters, name: InitialM, scale: float, fisher: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return ``scale`` · saliency / root mean square over all layers, or by magnitude or a constant, per layer."""
        if name == "fisher":
            return self._initial_M_by_saliency(aux, scale, fisher)
        return self.start_layers(aux, scale, lambda T: initial_m(T, name, scale))

    def _initial_M_by_saliency(  # noqa: N802
        self, aux: AuxiliaryParameters, scale: float, fisher: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Return the M of each layer; a layer without F gets the mean of the others, or 1 if there is none."""
        layers = aux.effective()
        known = [F for F in fisher if F is not None]
        total = math.fsum(fetch_numbers([F.sum() for F in known])) if known else 0.0
        total, count = aux.placement.sum([total, float(sum(F.numel() for F in known))])
        mean_F = total / count if total > 0 else 1.0
        saliencies = [
            saliency(T, torch.full_like(T, mean_F, dtype=torch.float32) if F is None else F, mean_F)
            for T, F in zip(layers, fisher, strict=True)
        ]
        norms = fetch_numbers([torch.linalg.vector_norm(S) for S in saliencies])
        squares = aux.placement.sum([norm * norm for norm in norms])
        usable = [math.isfinite(square) and square > 0 for square in squares]
        sizes = sum(size for size, use in zip(aux.totals, usable, strict=True) if use)
        unit = math.sqrt(sum(q for q, use in zip(squares, usable, strict=True) if use) / max(sizes, 1))
        warn_of_constant([layer for layer, use in zip(aux.weights, usable, strict=True) if not use])
        return [S.mul_(scale / unit) if use else S.fill_(scale) for S, use in zip(saliencies, usable, strict=True)]

    def sensitivities(
        self, aux: AuxiliaryParameters, dL_dT: Sequence[Tensor | None], rule: UpdateRule
    ) -> Iterator[StepPiece]:
        """Yield each bucket in pieces that are small enough to stay in the processor's cache."""
        which, effective = aux.trained_buckets(dL_dT), aux.effective()
        for k in which:
            bucket, start = aux.buckets[k], 0
            flat = bucket.flatten(dL_dT), bucket.flatten(effective), aux.flat_dormant[k]  # type: ignore[arg-type]
            for gradient, T, dormant in split_pieces(*flat):
                span = slice(start, start + len(T))
                W = T + dormant  # one of them is 0 or -0.0
                yield StepPiece(sensitivity(rule, gradient, W), k, span)
                start = span.stop

    def update_masks(self, aux: AuxiliaryParameters) -> None:
        """Keep the weights with m > 0; a layer below its floor keeps those with the largest m, raised just above 0."""
        self._write_masks(aux, aux.flat_M, aux.M)

    def _write_masks(self, aux: AuxiliaryParameters, flat: Sequence[Tensor], by_layer: Sequence[Tensor]) -> None:
        """Write the masks of scores, given flat in buckets and as views by layer; those below floors are raised."""
        aux.write_masks(range(len(aux.buckets)), flat)
        low = {i for i, (kept, floor) in enumerate(zip(aux.kept, aux.floors, strict=True)) if kept < floor}
        for i in sorted(low):
            aux.placement.lift_largest(by_layer[i], aux.floors[i])
        if low:
            aux.write_masks([k for k, bucket in enumerate(aux.buckets) if low & set(bucket.numbers)], flat)

    def density_of(self, aux: AuxiliaryParameters, layers: Sequence[int]) -> float:
        """Return kept weights / all weights of some layers."""
        return sum(aux.kept[i] for i in layers) / sum(aux.totals[i] for i in layers)

    def approach(self, aux: AuxiliaryParameters, density: float, layers: Sequence[int], share: float) -> None:
        """Let the masks of some layers meet a density nearly: they are h(M - θ), and M moves by a share of θ."""
        is_whole = len(layers) == len(aux.M)
        some_M = aux.flat_M if is_whole else [aux.M[i] for i in layers]
        count = round(density * sum(aux.totals[i] for i in layers))
        threshold = threshold_near(some_M, count, sum_over_ranks=aux.placement.sum)
        scores = [M.clone() for M in aux.flat_M]
        by_layer = self.views(aux, scores)
        for i in layers:
            by_layer[i].sub_(threshold)
        self._write_masks(aux, scores, by_layer)
        for M in some_M:
            M.sub_(threshold, alpha=share)
        aux.threshold = threshold * (1 - share)

    def meet(self, aux: AuxiliaryParameters, density: float) -> None:
        """Keep exactly the wanted number of weights: those with the largest m, each layer's floor first."""
        self.keep(aux, round(density * aux.total))

    def keep(self, aux: AuxiliaryParameters, count: int) -> None:
        """Keep exactly ``count`` weights: those with the largest m, each layer's floor first."""
        aux.placement.keep_largest(aux.M, aux.floors, count)
        self.update_masks(aux)

    def floors(self, weights: Mapping[str, Tensor], layer_floor: float) -> list[int]:
        """Return the number of weights that each layer always keeps."""
        return minimum_counts([weight.numel() for weight in weights.values()], layer_floor)

    def check_density(self, weights: Mapping[str, Tensor], density: float, layer_floor: float) -> None:
        """Raise unless the density can be met with the weights that the layers always keep."""
        totals = [weight.numel() for weight in weights.values()]
        check_count(round(density * sum(totals)), totals, layer_floor)
