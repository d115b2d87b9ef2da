"""Dormant values hold the masks: -0.0 where a weight is kept, and never where it is pruned."""

from __future__ import annotations

import pytest
import torch
from helpers import same
from torch import Tensor

from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.tensors.bitmasks import as_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def prune(aux: AuxiliaryParameters, *masks: Tensor) -> None:
    for M, mask in zip(aux.M, masks, strict=True):
        M.copy_(torch.where(mask, 1.0, -1.0))
    aux.update_masks()


def special_values(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1.5, -1.5, torch.nan, torch.inf, -torch.inf, info.tiny, -info.smallest_normal, info.max]
    return torch.tensor(values, dtype=dtype).repeat(7000)  # more than one piece


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_comes_back_with_the_same_bits_but_minus_zero_as_zero(dtype):
    weight = special_values(dtype)
    original, generator = as_bits(weight).clone(), torch.Generator().manual_seed(0)
    kept_always = torch.ones(len(weight), dtype=torch.bool)
    aux = AuxiliaryParameters({"layer": weight}, initial_m="constant", layer_floor=0)
    prune(aux, kept_always)
    assert torch.equal(as_bits(weight), original)
    for _ in range(4):
        mask = torch.rand(len(weight), generator=generator) < 0.5
        prune(aux, mask)
        kept_always &= mask
        assert torch.equal(aux.masks()[0], mask)
        assert aux.kept == [int(mask.sum())]
        assert not as_bits(weight)[~mask].any()
        assert torch.equal(aux.W[0].nan_to_num(), (weight + aux.dormant[0]).nan_to_num())
    prune(aux, torch.ones(len(weight), dtype=torch.bool))
    minus_zero = original == torch.iinfo(original.dtype).min
    expected = original.masked_fill(minus_zero & ~kept_always, 0)
    assert torch.equal(as_bits(weight)[~weight.isnan()], expected[~weight.isnan()])
    assert torch.equal(weight.isnan(), original.view(dtype).isnan())
    assert (minus_zero & kept_always).any()


def test_a_pruned_weight_of_minus_zero_stays_pruned_in_a_restored_state():
    weights = {"large": torch.randn(300, 300), "small": torch.randn(5, 4)}
    for weight in weights.values():
        weight[:, 0] = -0.0
    masks = [torch.rand(weight.shape) < 0.5 for weight in weights.values()]
    aux = AuxiliaryParameters(weights)
    prune(aux, *masks)
    restored = AuxiliaryParameters({name: w.clone() for name, w in weights.items()}, initial_m=None)
    restored.load_state_dict(aux.state_dict())
    assert same(restored.masks(), masks)
    assert same([as_bits(d) for d in restored.dormant], [as_bits(d) for d in aux.dormant])
    aux.finalize_masks()
    assert same(aux.masks(), masks)


def test_masks_are_those_that_were_applied_while_m_moves_on():
    weights = {"large": torch.randn(300, 300), "small": torch.randn(5, 4)}
    masks = [torch.rand(weight.shape) < 0.5 for weight in weights.values()]
    aux = AuxiliaryParameters(weights)
    prune(aux, *masks)
    for M in aux.M:
        M.neg_()
    W, kept = aux.W, sum(aux.kept)
    for weight in weights.values():
        weight.grad = torch.full_like(weight, torch.nan)
        weight.add_(1)
    aux.mask_gradients()
    aux.after_weight_step()
    assert same(aux.masks(), masks)
    assert all(torch.equal(w.grad.isnan(), mask) for w, mask in zip(weights.values(), masks, strict=True))
    assert all(torch.equal(w != 0, mask) for w, mask in zip(weights.values(), masks, strict=True))
    state = aux.state_dict()
    aux.update_masks()
    assert same(aux.masks(), [~mask for mask in masks])
    assert sum(aux.kept) == aux.total - kept
    for new, old, mask in zip(weights.values(), W, masks, strict=True):
        assert torch.equal(new, torch.where(mask, 0, old))
    restored = AuxiliaryParameters({name: torch.randn_like(w) for name, w in weights.items()}, initial_m=None)
    restored.load_state_dict(state)
    assert same(restored.masks(), masks)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps"])
def test_gradients_and_weights_of_any_memory_layout_are_masked(layout):
    def lay_out(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        return x.mT.contiguous().mT if layout == "transposed" else torch.stack([x, x], -1)[..., 0]

    weight, gradient = torch.randn(64, 32, 8, 8), torch.randn(64, 32, 8, 8)
    other_weight, other_gradient = lay_out(weight), lay_out(gradient)
    for w, g in [(other_weight.clone(), gradient), (weight.clone(), other_gradient), (other_weight, other_gradient)]:
        aux = AuxiliaryParameters({"layer": w})
        mask = torch.rand(w.shape) < 0.5
        prune(aux, mask)
        w.grad = g.clone()
        w.add_(1)
        aux.mask_gradients()
        aux.after_weight_step()
        assert torch.equal(w.grad, gradient * mask)
        assert torch.equal(w, (weight + 1) * mask)
