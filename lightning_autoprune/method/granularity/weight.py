"""One auxiliary parameter m per weight. Torch only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_autoprune.method.exact_topk import check_count, minimum_counts
from lightning_autoprune.method.granularity.base import Granularity, StepPiece, sensitivity
from lightning_autoprune.method.initialization import InitialM, initial_m
from lightning_autoprune.method.update_rules import UpdateRule
from lightning_autoprune.tensors.dtypes import at_least_float32
from lightning_autoprune.tensors.flat_buckets import split_pieces

if TYPE_CHECKING:
    from lightning_autoprune.method.auxiliary import AuxiliaryParameters

__all__ = ["WeightGranularity"]


class WeightGranularity(Granularity):
    """Single weights: M has the shape of W, and lies in buckets as W does, entry by entry."""

    name = "weight"

    def make_M(self, aux: AuxiliaryParameters) -> list[Tensor]:  # noqa: N802
        """Return one flat tensor of zeros per bucket, as large as the bucket."""
        return [torch.zeros_like(at_least_float32(flat)) for flat in aux.flat_dormant]

    def views(self, aux: AuxiliaryParameters, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor per layer, in the layer's shape."""
        return aux.views(flat)

    def initial_M(self, aux: AuxiliaryParameters, name: InitialM, scale: float) -> list[Tensor]:  # noqa: N802
        """Return ``scale`` · abs(w) / std(w) of each layer, or a constant."""
        return self.start_layers(aux, scale, lambda T: initial_m(T, name, scale))

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
        aux.write_masks(range(len(aux.buckets)), aux.flat_M)
        low = {i for i, (kept, floor) in enumerate(zip(aux.kept, aux.floors, strict=True)) if kept < floor}
        for i in sorted(low):
            aux.placement.lift_largest(aux.M[i], aux.floors[i])
        if low:
            aux.write_masks([k for k, bucket in enumerate(aux.buckets) if low & set(bucket.numbers)], aux.flat_M)

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
