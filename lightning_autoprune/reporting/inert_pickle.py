"""A ``pickle_module`` for ``torch.load`` that builds tensors and plain containers from a file, and runs nothing else.

``torch.load(weights_only=True)`` refuses a whole file for one object that it does not know, such as a path or a metric
among the hyperparameters. This module reads the rest of it: every class and function that is not in its short list of
builders is replaced by :class:`Inert`, which takes all that a pickle can do to an object and does nothing. The code of
such an object is not even imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Inert", "Unpickler", "load"]


def _ignore(*_: Any, **__: Any) -> None:
    """Do nothing."""


class Inert:
    """Stands in for an object that is not built. Each class or function of a file gets a subclass of that name."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Return an instance, whatever the arguments."""
        return object.__new__(cls)

    __setstate__ = __setitem__ = append = extend = add = update = _ignore

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Return another stand-in: an unknown function may return a function."""
        return Inert()


class _Builder:
    """Calls a function that builds a value. A pickle can't change it, as it could a function or a class."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    __setstate__ = _ignore

    def __call__(self, *args: Any) -> Any:
        return args[0] if args and isinstance(args[0], Inert) else self._build(*args)


class _Dict(dict):  # type: ignore[type-arg]
    """A dictionary that ignores the attributes that a file gives it, such as the metadata of a state dict."""

    __slots__ = ()
    __setstate__ = _ignore


class _SubclassBuilder(_Builder):
    """Builds a plain tensor in place of an instance of a subclass: ``(function, subclass, arguments, state)``."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        function, _, arguments, *_ = args
        return function(*arguments) if isinstance(function, _Builder) else Inert()


def _first(value: Any, *_: Any) -> Any:
    return value


_TENSOR_BUILDERS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_nested_tensor",
    "_rebuild_meta_tensor_no_storage",
)  # functions of torch._utils by the names that files have

_BUILDERS: dict[tuple[str, str], _Builder] = {
    **{
        ("torch._utils", name): _Builder(vars(torch._utils)[name])
        for name in _TENSOR_BUILDERS
        if name in vars(torch._utils)  # not every version of torch has all of them
    },
    ("torch._utils", "_rebuild_parameter"): _Builder(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Builder(_first),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _Builder(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): _SubclassBuilder(_first),
    ("torch.serialization", "_get_layout"): _Builder(torch.serialization._get_layout),
    ("torch", "Size"): _Builder(torch.Size),
    ("torch", "device"): _Builder(torch.device),
    ("collections", "OrderedDict"): _Builder(lambda *_: _Dict()),
    ("collections", "defaultdict"): _Builder(lambda *_: _Dict()),
}


class Unpickler(pickle.Unpickler):
    """Builds what is known to be harmless, and an :class:`Inert` object in place of everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the builder, dtype or stand-in for a global of the file; import nothing."""
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if name == "UntypedStorage" and module in ("torch", "torch.storage"):
            return SimpleNamespace(dtype=torch.uint8)  # all that torch.load reads of the class
        value = vars(torch).get(name) if module == "torch" else None
        return value if isinstance(value, (torch.dtype, torch.qscheme)) else type(name, (Inert,), {})


def load(file: BinaryIO, **options: Any) -> Any:
    """Read one pickle from a file; ``torch.load`` calls this for files of before PyTorch 1.6."""
    return Unpickler(file, **options).load()
