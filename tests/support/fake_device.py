"""A device of torch's own kind, written in Python, that has no float64 and random numbers of its own, as Apple's GPUs.

Import this module in a process of its own: it registers the device ``"fake"`` for good. A tensor on the device wraps
one on the CPU. As on a real device, operations don't mix tensors of the device and of the CPU, and no tensor of the
device is, or is made as, float64.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
CPU = torch.device("cpu")


class FakeModule:
    """What torch asks of the module of a device: ``torch.fake``."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:  # torch asks each device that it knows
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = "fake") -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = "fake") -> None:
        self.generator.set_state(state)


class FakeTensor(Tensor):
    """A tensor on the device; ``raw`` holds its values."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> FakeTensor:
        if raw.dtype == torch.float64:
            raise TypeError("The fake device has no float64.")
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="fake:0"
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operation, *args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = FakeTensor(self.raw.clone())
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, self.requires_grad)
        return memo.setdefault(id(self), made)

    def __reduce_ex__(self, protocol: int) -> Any:  # files hold tensors of the CPU
        return self.detach().cpu().__reduce_ex__(protocol)


def run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation of which an argument, or the device to make a tensor on, is on the device."""
    if operation is aten.copy_.default:
        target, source = args[:2]
        raw_of(target).copy_(raw_of(source))
        return target
    if operation is aten._local_scalar_dense.default:
        return args[0].raw.item()
    if operation is aten._to_copy.default:
        device = kwargs.get("device") or args[0].device
        moved = aten._to_copy(raw_of(args[0]), **{**kwargs, "device": CPU})
        return moved if torch.device(device) == CPU else FakeTensor(moved)
    for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.dim():
            raise RuntimeError(f"{operation} mixes tensors of the device and of the CPU.")
    wrapped: dict[int, Tensor] = {}

    def unwrap(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            wrapped[id(x.raw)] = x
        return CPU if isinstance(x, torch.device) else raw_of(x)

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return wrapped[id(x)] if id(x) in wrapped else FakeTensor(x)  # an operation in place returns its argument

    raw_args, raw_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
    if torch.Tag.nondeterministic_seeded in operation.tags and raw_kwargs.get("generator") is None:
        with torch.random.fork_rng(devices=[]):  # draw from the device's own random numbers
            torch.set_rng_state(torch.fake.get_rng_state())
            result = operation(*raw_args, **raw_kwargs)
            torch.fake.set_rng_state(torch.get_rng_state())
    else:
        result = operation(*raw_args, **raw_kwargs)
    return tree_map(wrap, result)


def raw_of(x: Any) -> Any:
    return x.raw if isinstance(x, FakeTensor) else x


def register() -> None:
    """Register the device ``"fake"`` in this process."""
    _setup_privateuseone_for_python_backend("fake", FakeModule())
    library.fallback(run, "PrivateUse1")
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """Stand in for ``torch.tensor``, which can't make a tensor on a device that is written in Python."""
        return make(data, **options).to(device) if device is not None else make(data, **options)

    torch.tensor = tensor


library = torch.library.Library("_", "IMPL")
register()


class FakeAccelerator(Accelerator):
    """Lightning's view of the device."""

    @staticmethod
    def name() -> str:
        return "fake"

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("fake:0")]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


def strategy() -> SingleDeviceStrategy:
    """Return the strategy that trains on the device; pass it to the Trainer with ``accelerator="auto"``."""
    return SingleDeviceStrategy(torch.device("fake:0"), FakeAccelerator())
