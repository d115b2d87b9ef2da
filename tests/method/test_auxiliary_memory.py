"""How many bytes ``AuxiliaryParameters`` hold per weight, during pruning and once masks are final."""

from __future__ import annotations

import pytest
import torch

from lightning_autoprune.method.auxiliary import AuxiliaryParameters


def count_bytes(value, seen: set[int]) -> int:
    """Return the bytes of tensor memory in the attributes of an object, without storages in ``seen``."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        new = storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        return storage.nbytes() if new else 0
    if isinstance(value, dict):
        return sum(count_bytes(v, seen) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(count_bytes(v, seen) for v in value)
    return count_bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


@pytest.mark.parametrize(
    ("rule", "dtype", "expected"),
    [
        ("adaptive", torch.float32, 12),
        ("adaptive", torch.bfloat16, 10),
        ("autoprune", torch.float32, 8),
        ("autoprune", torch.bfloat16, 6),
    ],
)
def test_bytes_per_weight_are_as_documented(rule, dtype, expected):
    """See the table in ``docs/large_models.md``."""
    weight = torch.randn(1000, 1000).to(dtype)
    aux = AuxiliaryParameters({"layer": weight}, update_rule=rule)
    aux.step([torch.randn_like(weight)], 0.1, 0.1)
    aux.update_masks()
    assert count_bytes(aux, {weight.untyped_storage().data_ptr()}) == pytest.approx(
        expected * weight.numel(), rel=0.001
    )


def test_final_masks_take_one_bit_per_weight():
    weight = torch.randn(1000, 1000)
    aux = AuxiliaryParameters({"layer": weight})
    aux.keep(100_000)
    kept = aux.masks()[0]
    aux.finalize_masks()
    assert count_bytes(aux, {weight.untyped_storage().data_ptr()}) < weight.numel() / 8 + 2**14
    weight.copy_(torch.randn(1000, 1000))
    aux.after_weight_step()
    assert torch.equal(weight != 0, kept)
    assert torch.equal(aux.masks()[0], kept)
