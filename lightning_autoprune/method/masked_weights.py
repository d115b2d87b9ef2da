"""Weights W whose storage holds T = W ⊙ h, in place, with what is needed to change the mask h. Torch only.

The dormant values of pruned weights are kept beside, so that W = T + dormant. Masks are bits (see ``masks``): -1 where
a weight is kept and 0 where it is pruned.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_autoprune.tensors.bitmasks import PackedMask, as_bits, pack_if_large, zero_pruned
from lightning_autoprune.tensors.flat_buckets import Bucket, fill_buckets, split_pieces
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["MaskedWeights", "fetch_numbers", "latent_weights"]


class MaskedWeights:
    """Weights with masks: creating it attaches, with all weights kept.

    Args:
        weights: parameters by layer name; floating point, any shapes.

    Attributes:
        weights: the parameters, by layer name; their storage holds T.
        dormant: the values of pruned weights, 0 where a weight is kept, so that W = T + dormant (empty once frozen).
        totals: number of weights in each layer.
        kept: number of weights kept in each layer.
        frozen: whether the masks are final.
    """

    dormant: list[Tensor]
    _bits: list[Tensor]
    _flat_dormant: list[Tensor]
    _flat_bits: list[Tensor]
    _buckets: list[Bucket]

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.totals = [weight.numel() for weight in self.weights.values()]
        self.kept = list(self.totals)
        self.frozen = False
        self._final: list[Tensor | PackedMask] = []  # what the bits become once they are frozen
        self._lay_out(fill_buckets(self._effective(), self.totals))

    @property
    def W(self) -> list[Tensor]:  # noqa: N802
        """Latent weights, new tensors: kept ones as they are now, pruned ones as they went. Empty once frozen."""
        parts = zip(self._effective(), self._bits, self.dormant, strict=False)
        return [latent_weights(T, bits, dormant) for T, bits, dormant in parts]

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

    def mask_gradients(self, stepped: Container[int] | None = None) -> None:
        """Turns each weight's gradient dL/dT into dL/dW = dL/dT ⊙ h(M), in place.

        Args:
            stepped: the ``id`` of each parameter that the coming step trains; None: of all.
        """
        for weight, mask in zip(self.weights.values(), self._final or self._bits, strict=True):
            if weight.grad is not None and (stepped is None or id(weight) in stepped):
                zero_pruned(local_shard(weight.grad), mask)

    def after_weight_step(self) -> None:
        """Sets pruned entries of T back to 0, which momentum and decay may have moved."""
        for T, mask in zip(self._effective(), self._final or self._bits, strict=True):
            zero_pruned(T, mask)

    # Masks

    def _decide(self, which: Iterable[int], scores: Sequence[Tensor]) -> None:
        """Keeps the weights of some buckets that have scores above 0, and writes T = W ⊙ h into them.

        Args:
            which: numbers of the buckets.
            scores: a flat tensor for each of all buckets.
        """
        which, effective = list(which), self._effective()
        counts = self._over_ranks(fetch_numbers([self._write(k, scores[k], effective) for k in which]))
        for i, count in zip((i for k in which for i in self._buckets[k].numbers), counts, strict=True):
            self.kept[i] = round(count)

    def _write(self, k: int, scores: Tensor, effective: Sequence[Tensor]) -> Tensor:
        """Decides and writes one bucket; gives the numbers of weights kept of its layers."""
        bucket, kept = self._buckets[k], []
        T, alone = bucket.flatten(effective), len(bucket.sizes) == 1
        for t, bits, dormant, score in split_pieces(
            as_bits(T), self._flat_bits[k], as_bits(self._flat_dormant[k]), scores
        ):
            W = (t & bits).bitwise_or_(dormant)
            torch.gt(score, 0, out=bits).neg_()
            torch.bitwise_and(W, bits, out=t)
            torch.bitwise_xor(W, t, out=dormant)
            if alone:
                kept.append(torch.count_nonzero(bits))  # while they are in the cache
        bucket.write(T, effective)
        return torch.stack(kept).sum() if alone else -bucket.sums(self._flat_bits[k])

    def _over_ranks(self, sums: list[float]) -> list[float]:
        """Sums over the parts of the weights that this process has, as those over the whole weights."""
        return sums

    def freeze(self) -> None:
        """Makes the masks final and forgets dormant values: pruned weights stay 0, kept ones train on."""
        if not self.frozen:
            self._final, self.frozen = [pack_if_large(bits) for bits in self._bits], True
        self.dormant, self._bits, self._flat_dormant, self._flat_bits, self._buckets = [], [], [], [], []

    # The layout of the state

    def _lay_out(self, buckets: Sequence[Bucket]) -> None:
        """Makes the tensors of the state, in buckets, as of weights that are all kept."""
        T = self._effective()
        kinds = [T[bucket.numbers[0]] for bucket in buckets]
        self._buckets = list(buckets)
        self._flat_dormant = [t.new_zeros(bucket.total) for t, bucket in zip(kinds, buckets, strict=True)]
        self._flat_bits = [torch.full_like(as_bits(flat), -1) for flat in self._flat_dormant]
        self.dormant = self._views(self._flat_dormant)
        self._bits = self._views(self._flat_bits)

    def _entries(self) -> list[list[Tensor]]:
        """The state that has an entry a weight: lists of one tensor a layer."""
        return [self.dormant, self._bits]

    def _lay_out_again(self, groups: Sequence[Sequence[int]], entries: Sequence[Sequence[Tensor]]) -> None:
        """Puts the state into other buckets.

        Args:
            groups: the numbers of the layers of each bucket.
            entries: the state, as of :meth:`_entries`.
        """
        T = self._effective()
        self._lay_out([Bucket(group, T) for group in groups])
        for new, old in zip(self._entries(), entries, strict=True):
            torch._foreach_copy_(new, list(old))

    def _views(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The parts of a flat tensor a bucket, in the order and the shapes of the layers."""
        found: dict[int, Tensor] = {}
        for bucket, tensor in zip(self._buckets, flat, strict=True):
            found.update(zip(bucket.numbers, bucket.views(tensor), strict=True))
        return [found[i] for i in range(len(found))]

    def _effective(self) -> list[Tensor]:
        return [local_shard(weight) for weight in self.weights.values()]


def latent_weights(T: Tensor, bits: Tensor, dormant: Tensor) -> Tensor:
    """W as a new tensor: T where kept (whoever wrote it), the dormant value where pruned."""
    return (as_bits(T) & bits).bitwise_or_(as_bits(dormant)).view(T.dtype)


def fetch_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The entries of small tensors, fetched from their device at once."""
    return torch.cat([tensor.view(-1).to(tensors[0].device, torch.float64) for tensor in tensors]).tolist()
