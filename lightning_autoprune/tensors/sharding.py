"""Weights of which each rank holds a part (FSDP2), as the local tensor of a ``DTensor``. Torch only.

What is done entry by entry is done on the parts; the functions here are for what is not. Tensors that are not sharded
pass through them as they are.

FSDP2 puts whole copies in the place of a module's parameters while it runs. A forward pass leaves those of the
outermost module there until its backward pass, and without one they grow stale: see :func:`reshard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "WholeTensors",
    "gather_whole",
    "is_sharded",
    "isolated_pass",
    "local_shard",
    "loss_gradients",
    "reshard",
    "shard_along",
    "shard_like",
    "sum_over_lower_ranks",
    "sum_over_ranks",
]


def is_sharded(x: Tensor) -> TypeIs[DTensor]:
    """Whether this rank has a part of a tensor only."""
    return hasattr(x, "device_mesh")  # not isinstance: its module is slow to import, and not in each build of torch


def local_shard(x: Tensor) -> Tensor:
    """The entries that this rank has of a tensor, in the same storage, without a graph; there may be none.

    Example:
        >>> local_shard(nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    if not is_sharded(x):
        return x.detach()
    with torch.no_grad():
        return x.to_local().detach()


def gather_whole(own: Tensor, like: Tensor) -> Tensor:
    """The whole of a tensor of which each rank has a part; to be called on all ranks.

    Args:
        own: this rank's part.
        like: a tensor that is sharded in the same way.
    """
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    if own.shape != local_shard(like).shape:  # an entry per block of each row
        shape = torch.Size([like.shape[0], *own.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


class WholeTensors(Mapping[str, Tensor]):
    """Whole tensors by name, each gathered when it is asked for, which all ranks do in the same order.

    Args:
        own: this rank's parts.
        like: tensors that are sharded in the same way, by name.
    """

    def __init__(self, own: Sequence[Tensor], like: Mapping[str, Tensor]) -> None:
        self._parts = dict(zip(like, zip(own, like.values(), strict=True), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return gather_whole(*self._parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that all ranks have; nothing is sent.

    Args:
        x: the same on all ranks.
        like: a tensor that is sharded as the result is to be.
    """
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements).to_local().clone()


def shard_along(x: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return the entries of a vector along one dimension of a tensor that belong to this rank's shard of it.

    Args:
        x: shape (like.shape[dim],), the same on all ranks.
        like: the tensor.
        dim: one of its dimensions.
    """
    if not is_sharded(like):
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, everywhere = like.device_mesh, [Replicate()] * like.device_mesh.ndim
    along = [Shard(0) if place.is_shard(dim) else Replicate() for place in like.placements]
    return DTensor.from_local(x, mesh, everywhere, run_check=False).redistribute(mesh, along).to_local().clone()


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """The sum of some numbers over all ranks, in place; each rank gets the same bits."""
    dist.all_reduce(numbers)
    return numbers


def sum_over_lower_ranks(own: int) -> int:
    """The sum of a number over the ranks before this one; to be called on all ranks."""
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return sum(found[: dist.get_rank()])


# A pass beside the training


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back in their place, from which the next forward pass gathers anew."""
    for module in model.modules():
        if callable(put_back := getattr(module, "reshard", None)) and hasattr(module, "unshard"):  # an FSDPModule
            put_back()


@contextmanager
def isolated_pass(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Runs a block with a forward pass, and maybe a backward pass, that leaves no trace in sharded parameters.

    Their gradients are None inside, and afterwards as before; what waits for a gradient to be complete (an optimizer
    that steps in the backward pass) is not called.

    Args:
        model: the module that is trained.
        weights: some of its parameters; if none of them is sharded, nothing is done.
    """
    if not any(is_sharded(weight) for weight in weights):
        yield
        return
    reshard(model)
    saved = [(p, p.grad, p._post_accumulate_grad_hooks) for p in model.parameters()]
    for parameter, *_ in saved:
        parameter.grad, parameter._post_accumulate_grad_hooks = None, {}
    try:
        yield
    finally:
        reshard(model)
        for parameter, gradient, hooks in saved:
            parameter.grad, parameter._post_accumulate_grad_hooks = gradient, hooks


def loss_gradients(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of a loss; None where it does not depend on a weight.

    Args:
        loss: a scalar.
        weights: parameters. Of sharded ones the result is this rank's part, and the mean over the ranks' losses; it
            takes a backward pass (``autograd.grad`` gives None), inside :func:`isolated_pass`.
    """
    if not any(is_sharded(weight) for weight in weights):
        return list(torch.autograd.grad(loss, weights, allow_unused=True))
    loss.backward()  # type: ignore[no-untyped-call]
    return [None if weight.grad is None else local_shard(weight.grad) for weight in weights]
