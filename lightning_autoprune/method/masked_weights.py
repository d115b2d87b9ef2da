"""Weights W whose storage holds T = W ⊙ h in place, and what is needed to change the mask h. Torch only.

The values of pruned weights are kept as dormant values, so that W = T + dormant. These also hold the mask: where a
weight is kept, its dormant value is -0.0, and no pruned weight has that one, since a value of -0.0 becomes dormant as
0.0. So the mask takes no memory of its own. It is the one that was applied, whatever M has become since. Once masks are
final they are bits (see ``bitmasks``), and the dormant values are forgotten.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_autoprune.method.placement import placement_of
from lightning_autoprune.tensors.bitmasks import PackedMask, as_bits, pack_if_large, zero_pruned
from lightning_autoprune.tensors.flat_buckets import Bucket, fill_buckets, split_pieces
from lightning_autoprune.tensors.sharding import local_shard

__all__ = ["MaskedWeights", "fetch_numbers", "latent_weights", "mark_kept"]


class MaskedWeights:
    """Weights with masks. Creating an instance attaches it: from then on the storage of each weight holds T.

    Tensors of this class are shards where the weights are sharded. The state lies in buckets: flat tensors that hold
    several small layers, or one large layer (see ``flat_buckets``).

    Args:
        weights: parameters by layer name; floating point, any shapes.

    Attributes:
        weights: the parameters, by layer name; their storage holds T.
        placement: where they are: on this device, or sharded over ranks.
        totals: number of weights in each layer.
        kept: number of weights kept in each layer.
        dormant: the values of pruned weights, -0.0 where a weight is kept, one tensor per layer (empty once masks are
            final).
        buckets: which layers lie in one flat tensor (empty once masks are final).
        flat_dormant: the dormant values, one flat tensor per bucket.
        masks_final: True once the masks do not change any more.
    """

    dormant: list[Tensor]
    flat_dormant: list[Tensor]
    buckets: list[Bucket]

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.placement = placement_of(self.weights.values())
        self.totals = [weight.numel() for weight in self.weights.values()]
        self.kept = list(self.totals)
        self.masks_final = False
        self._final: list[Tensor | PackedMask] = []  # the masks once they are final
        self._make_state(fill_buckets(self.effective(), self.totals))

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(self.totals)

    @property
    def W(self) -> list[Tensor]:  # noqa: N802
        """Latent weights, new tensors: present values where kept, dormant values where pruned; empty once final."""
        return [latent_weights(T, dormant) for T, dormant in zip(self.effective(), self.dormant, strict=False)]

    def effective(self) -> list[Tensor]:
        """Return T, one tensor per layer, in the storage of the weights."""
        return [local_shard(weight) for weight in self.weights.values()]

    def masks(self) -> list[Tensor]:
        """Return h(M) as bool tensors, True where a weight is kept."""
        return [mask.bool() for mask in self._final] or [_kept(dormant).bool() for dormant in self.dormant]

    # The weight step

    def mask_gradients(self, stepped: Container[int] | None = None) -> None:
        """Turn each weight's gradient dL/dT into dL/dW = dL/dT ⊙ h(M), in place.

        Args:
            stepped: the ``id`` of each parameter that the coming step trains; None: all of them.
        """
        gradients = {
            i: local_shard(weight.grad)
            for i, weight in enumerate(self.weights.values())
            if weight.grad is not None and (stepped is None or id(weight) in stepped)
        }
        self._zero_pruned(gradients)

    def after_weight_step(self) -> None:
        """Set pruned entries of T back to 0, since momentum and weight decay may have moved them."""
        self._zero_pruned(dict(enumerate(self.effective())))

    def _zero_pruned(self, tensors: Mapping[int, Tensor]) -> None:
        """Set the pruned entries of tensors to 0.0, in place; each is given by the number of its weight."""
        if self.masks_final:
            for i, x in tensors.items():
                zero_pruned(x, self._final[i])
            return
        for bucket, flat in zip(self.buckets, self.flat_dormant, strict=True):
            found = [(j, as_bits(tensors[i])) for j, i in enumerate(bucket.numbers) if i in tensors]
            if not found:
                continue
            bits = [x for _, x in found]
            if len(bucket.numbers) == 1 and bits[0].stride() == self.dormant[bucket.numbers[0]].stride():
                entries = bits[0].as_strided((bucket.total,), (1,))  # in the order of the dormant values, without gaps
                for piece, dormant in split_pieces(entries, flat):
                    piece.mul_(_kept(dormant))
            else:
                masks = bucket.views(_kept(flat))
                torch._foreach_mul_(bits, [masks[j] for j, _ in found])

    def pruned_are_zero(self) -> bool:
        """Return True if all pruned entries of T are 0 on this rank: nothing else has written to them."""
        masks = self._final or map(_kept, self.dormant)
        layers = zip(self.effective(), masks, strict=True)
        return not any(fetch_numbers([torch.count_nonzero(T.masked_fill(mask.bool(), 0)) for T, mask in layers]))

    # Masks

    def write_masks(self, which: Iterable[int], scores: Sequence[Tensor]) -> None:
        """Keep the weights of some buckets that have scores above 0, and write T = W ⊙ h into them.

        Args:
            which: numbers of the buckets.
            scores: one flat tensor for every bucket, of any dtype; only those of ``which`` are read.
        """
        which, effective = list(which), self.effective()
        counts = self.placement.sum(fetch_numbers([self._write_bucket(k, scores[k], effective) for k in which]))
        for i, count in zip((i for k in which for i in self.buckets[k].numbers), counts, strict=True):
            self.kept[i] = round(count)

    def write_layer_masks(self, masks: Iterable[Tensor]) -> None:
        """Keep the weights at which masks are True, and write T = W ⊙ h into all of them.

        Args:
            masks: one bool tensor per layer that can be broadcast to the layer's shape.
        """
        layers = [
            torch.empty_like(T, dtype=torch.bool).copy_(mask) for T, mask in zip(self.effective(), masks, strict=True)
        ]
        self.write_masks(range(len(self.buckets)), [bucket.flatten(layers) for bucket in self.buckets])

    def _write_bucket(self, k: int, scores: Tensor, effective: Sequence[Tensor]) -> Tensor:
        """Write one bucket, and return the number of weights that each of its layers keeps."""
        bucket, counts = self.buckets[k], []
        T, alone = bucket.flatten(effective), len(bucket.sizes) == 1
        for t, values, score in split_pieces(T, self.flat_dormant[k], scores):
            t, dormant, kept = as_bits(t), as_bits(values), _kept(values)
            W = (t ^ dormant).mul_(kept).bitwise_xor_(dormant)
            torch.gt(score, 0, out=kept)
            torch.mul(W, kept, out=t)
            torch.bitwise_xor(W, t, out=dormant)  # 0 where kept
            values.add_(0.0)  # -0.0 becomes 0.0
            dormant.add_(kept, alpha=_bits_of_kept(dormant))
            counts.append(torch.count_nonzero(kept) if alone else bucket.sums(kept))  # while it is in the cache
        bucket.write(T, effective)
        return torch.stack(counts).sum(0)

    def _finalize(self) -> None:
        """Make the masks final and forget dormant values: pruned weights stay 0, kept ones train on."""
        if not self.masks_final:
            self._final = [pack_if_large(_kept(dormant).neg_()) for dormant in self.dormant]
            self.masks_final = True
        self.dormant, self.flat_dormant, self.buckets = [], [], []

    # The layout of the state

    def _make_state(self, buckets: Sequence[Bucket]) -> None:
        """Make the tensors of the state, in buckets, for weights that are all kept."""
        T = self.effective()
        kinds = [T[bucket.numbers[0]] for bucket in buckets]
        self.buckets = list(buckets)
        self.flat_dormant = [t.new_full((bucket.total,), -0.0) for t, bucket in zip(kinds, buckets, strict=True)]
        self.dormant = self.views(self.flat_dormant)

    def views(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """Return each layer's part of the flat tensors, given one per bucket, in the shape of the layer."""
        parts: dict[int, Tensor] = {}
        for bucket, tensor in zip(self.buckets, flat, strict=True):
            parts.update(zip(bucket.numbers, bucket.views(tensor), strict=True))
        return [parts[i] for i in range(len(parts))]


def latent_weights(T: Tensor, dormant: Tensor) -> Tensor:
    """Return W as a new tensor: T where kept (whoever wrote it), the dormant value where pruned."""
    bits = as_bits(dormant)
    return (as_bits(T) ^ bits).mul_(_kept(dormant)).bitwise_xor_(bits).view(T.dtype)


def mark_kept(values: Tensor, mask: Tensor) -> Tensor:
    """Return dormant values that hold a mask: the given values where it is False, -0.0 where it is True."""
    return torch.where(mask, -0.0, values + 0.0)  # -0.0 becomes 0.0 where a weight is pruned


def _kept(dormant: Tensor) -> Tensor:
    """Return the mask that dormant values hold, as integers of their item size: 1 where kept, 0 where pruned."""
    bits = as_bits(dormant)
    return torch.eq(bits, _bits_of_kept(bits), out=torch.empty_like(bits))


def _bits_of_kept(bits: Tensor) -> int:
    """Return the bits of -0.0 as an integer of a dtype: the sign alone."""
    return torch.iinfo(bits.dtype).min


def fetch_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Return the entries of small tensors as Python numbers, fetched from their device at once."""
    # in the tensors' own dtype: not every device has float64
    return torch.cat([tensor.view(-1).to(tensors[0].device) for tensor in tensors]).tolist()
