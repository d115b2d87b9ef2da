"""Sharded weights (FSDP2): each rank holds one shard of a weight, the local tensor of a ``DTensor``. Torch only.

Elementwise operations need nothing but :func:`local_shard`: they run on the shard. The other functions are for
operations that look at more than one entry, and for forward and backward passes beside the training. Functions of a
weight also take plain tensors, so that callers need not ask whether it is sharded.

A *whole* tensor has the full shape. A function that communicates says "Call it on all ranks": if one rank does not, the
others wait forever.

FSDP2 replaces the sharded parameters of a module with whole copies while the module runs. After a forward pass the
outermost module keeps its copies for the backward pass. If no backward pass follows, the copies stay and become stale
at the next weight step: see :func:`reshard`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

__all__ = [
    "Layout",
    "WholeTensors",
    "gather_whole",
    "is_sharded",
    "isolated_pass",
    "layout",
    "local_shard",
    "loss_gradients",
    "reshard",
    "shard_along",
    "shard_like",
    "sum_numbers_over_ranks",
    "sum_over_lower_ranks",
    "sum_over_ranks",
]


def is_sharded(x: Tensor) -> TypeIs[DTensor]:
    """Return True if a tensor is a ``DTensor``, of which this rank holds only a shard.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return hasattr(x, "device_mesh")  # not isinstance: DTensor's module is slow to import, and some builds lack it


def local_shard(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, detached, in the same storage; all of a tensor that is not sharded.

    Returns:
        A plain tensor; writes to it change ``x``. It is empty on some ranks if the tensor has fewer rows than there
        are ranks.

    Example:
        >>> local_shard(nn.Parameter(torch.ones(2)))
        tensor([1., 1.])
    """
    if not is_sharded(x):
        return x.detach()
    with torch.no_grad():
        return x.to_local().detach()


class Layout(NamedTuple):
    """How a tensor is stored.

    Attributes:
        shape: the whole shape.
        dtype: the dtype of its entries.
        device: where they are.
        placements: how the ranks share it; None if it is not sharded.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    placements: object


def layout(x: Tensor) -> Layout:
    """Return how a tensor is stored.

    Example:
        >>> layout(torch.ones(2)).dtype
        torch.float32
    """
    return Layout(x.shape, x.dtype, x.device, x.placements if is_sharded(x) else None)


def gather_whole(shard: Tensor, like: Tensor) -> Tensor:
    """Gather a whole tensor from the shards of all ranks. Call it on all ranks.

    Args:
        shard: this rank's shard, of any dtype.
        like: a tensor of the whole shape that is sharded in the same way, such as the weight that a mask belongs to.

    Returns:
        The whole tensor on every rank, with the shape of ``like``; ``shard`` itself if ``like`` is not sharded.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> gather_whole(local_shard(weight) > 0, weight)
        tensor([True, True])
    """
    if not is_sharded(like):
        return shard
    from torch.distributed.tensor import DTensor

    shape, stride = like.shape, like.stride()
    if shard.shape != local_shard(like).shape:  # an entry per block of each row
        shape = torch.Size([like.shape[0], *shard.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


class WholeTensors(Mapping[str, Tensor]):
    """Whole tensors by name, each gathered when it is looked up, so that only one at a time takes memory.

    A lookup communicates: all ranks must look up the same names in the same order.

    Args:
        shards: this rank's shards, in the order of ``like``.
        like: tensors that are sharded in the same way, by name.

    Example:
        >>> weights = {"first": torch.ones(2), "last": torch.ones(1)}
        >>> wholes = WholeTensors([torch.zeros(2), torch.zeros(1)], weights)
        >>> list(wholes), wholes["first"]
        (['first', 'last'], tensor([0., 0.]))
    """

    def __init__(self, shards: Sequence[Tensor], like: Mapping[str, Tensor]) -> None:
        self._shards = dict(zip(like, zip(shards, like.values(), strict=True), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return gather_whole(*self._shards[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Cut this rank's shard out of a tensor that all ranks have. Nothing is sent.

    Args:
        whole: the whole tensor, the same on all ranks.
        like: a tensor of the same shape that is sharded as the result is to be.

    Returns:
        A copy of this rank's entries; ``whole`` itself if ``like`` is not sharded. :func:`gather_whole` is the inverse.

    Example:
        >>> shard_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements).to_local().clone()


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
    """Sum a tensor over all ranks, in place; every rank gets the same bits. Call it on all ranks."""
    dist.all_reduce(numbers)
    return numbers


def sum_numbers_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all ranks in double precision; every rank gets the same bits. Call it on all ranks.

    Args:
        numbers: those of this rank; all ranks pass as many.
        device: a device from which tensors can be sent. It need not have float64: the bits travel as integers.
    """
    mine = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    sums: list[float] = torch.stack(gathered).cpu().view(torch.float64).sum(0).tolist()
    return sums


def sum_over_lower_ranks(number: int) -> int:
    """Return the sum of the numbers that the ranks below this one pass; 0 on rank 0. Call it on all ranks."""
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return sum(numbers[: dist.get_rank()])


# Passes beside the training


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place of whole copies, so that the next forward pass gathers them anew.

    Modules without FSDP2 are left alone.
    """
    for module in model.modules():
        if callable(put_back := getattr(module, "reshard", None)) and hasattr(module, "unshard"):  # an FSDPModule
            put_back()


@contextmanager
def isolated_pass(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Run a forward pass, and maybe a backward pass, that leaves no trace in sharded parameters.

    All gradients are None inside the block; afterwards they are as before. Hooks that wait for a complete gradient are
    not called, such as an optimizer that steps in the backward pass.

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
    """Return the gradient of a loss for each weight, None for a weight that the loss does not depend on.

    Args:
        loss: a scalar.
        weights: parameters. If any is sharded, call this on all ranks and inside :func:`isolated_pass`: it takes a
            backward pass, since ``torch.autograd.grad`` gives None for sharded parameters.

    Returns:
        One tensor per weight, of the weight's shape. For sharded weights it is this rank's shard, and the gradient is
        that of the mean of the ranks' losses.

    Example:
        >>> used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        >>> loss_gradients((3 * used).sum(), [used, unused])
        [tensor([3., 3.]), None]
    """
    if not any(is_sharded(weight) for weight in weights):
        return list(torch.autograd.grad(loss, weights, allow_unused=True))
    loss.backward()  # type: ignore[no-untyped-call]
    return [None if weight.grad is None else local_shard(weight.grad) for weight in weights]
