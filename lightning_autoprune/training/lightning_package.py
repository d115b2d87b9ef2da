"""Lightning, whose classes come in two packages: ``lightning.pytorch`` and ``pytorch_lightning``.

Both have the same code, and yet an instance of a class of one is not an instance of the other's. The names of this
module are those of ``lightning.pytorch`` if it is installed, else those of ``pytorch_lightning``. Every check of what
the user passes in must accept either: ``isinstance(logger, both(WandbLogger))``.

All other modules import Lightning from here.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = [
    "BaseCallback",
    "CSVLogger",
    "Callback",
    "CombinedLoader",
    "DDPStrategy",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MLFlowLogger",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "ModelPruning",
    "OptimizerLRSchedulerConfig",
    "SingleDeviceStrategy",
    "SingleDeviceXLAStrategy",
    "StochasticWeightAveraging",
    "Strategy",
    "TensorBoardLogger",
    "Trainer",
    "WandbLogger",
    "WeightAveraging",
    "both",
    "find_package",
    "get_filesystem",
    "is_oom_error",
    "is_overridden",
    "is_param_in_hook_signature",
    "seed_everything",
    "submodule",
]

_PACKAGES = (("lightning.pytorch", "lightning.fabric"), ("pytorch_lightning", "lightning_fabric"))

_T = TypeVar("_T")


def _is_usable(package: str) -> bool:
    """Return True if a package is installed and recent enough to have what is used of it."""
    try:
        return hasattr(import_module(f"{package}.callbacks"), "WeightAveraging")
    except ImportError:
        return False


_USABLE = [names for names in _PACKAGES if _is_usable(names[0])]


def submodule(name: str) -> ModuleType:
    """Import a submodule by its name in ``lightning``, such as ``fabric.utilities.data``."""
    part, _, rest = name.partition(".")
    pytorch, fabric = _USABLE[0]
    return import_module(f"{pytorch if part == 'pytorch' else fabric}.{rest}")


def both(kind: type[_T]) -> tuple[type[_T], ...]:
    """Return a class of Lightning, and the class of that name in the other package if that is installed.

    Example:
        >>> [kind.__module__.partition(".")[0] for kind in both(ModelCheckpoint)]
        ['lightning', 'pytorch_lightning']
    """
    anything: Any = kind  # for mypy a type[_T] has no hash
    twins: tuple[type[_T], ...] = _find_twins(anything)
    return twins


@cache
def _find_twins(kind: Any) -> Any:
    kinds = [kind]
    for here, there in zip(*_USABLE, strict=True) if len(_USABLE) > 1 else ():
        if kind.__module__.startswith(f"{here}."):
            kinds.append(getattr(import_module(there + kind.__module__.removeprefix(here)), kind.__name__))
    return tuple(kinds)


if TYPE_CHECKING:
    from lightning.fabric.utilities.cloud_io import get_filesystem
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import (
        EarlyStopping,
        GradientAccumulationScheduler,
        ModelCheckpoint,
        ModelPruning,
        StochasticWeightAveraging,
        WeightAveraging,
    )
    from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
    from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.memory import is_oom_error
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

    BaseCallback = Callback
else:
    _PLACES = {
        "fabric.utilities.cloud_io": ("get_filesystem",),
        "fabric.utilities.exceptions": ("MisconfigurationException",),
        "pytorch.callbacks": (
            "Callback",
            "EarlyStopping",
            "GradientAccumulationScheduler",
            "ModelCheckpoint",
            "ModelPruning",
            "StochasticWeightAveraging",
            "WeightAveraging",
        ),
        "pytorch.core": ("LightningDataModule", "LightningModule"),
        "pytorch.loggers": ("CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
        "pytorch.strategies": ("DDPStrategy", "ModelParallelStrategy", "SingleDeviceStrategy", "Strategy"),
        "pytorch.strategies.single_xla": ("SingleDeviceXLAStrategy",),
        "pytorch.trainer": ("Trainer",),
        "fabric.utilities.seed": ("seed_everything",),
        "pytorch.utilities": ("CombinedLoader",),
        "pytorch.utilities.memory": ("is_oom_error",),
        "pytorch.utilities.model_helpers": ("is_overridden",),
        "pytorch.utilities.signature_utils": ("is_param_in_hook_signature",),
        "pytorch.utilities.types": ("OptimizerLRSchedulerConfig",),
    }
    for _place, _names in _PLACES.items():
        globals().update({_name: getattr(submodule(_place), _name) for _name in _names})
    BaseCallback = type("BaseCallback", both(Callback), {"__doc__": "A callback for the Trainer of either package."})


def find_package(x: Any) -> str:
    """Return the name and the version of the package that the class of an object is from."""
    for kind in type(x).__mro__:
        name = kind.__module__.partition(".")[0]
        if name in ("lightning", "pytorch_lightning"):
            return f"{name} {import_module(name).__version__}"
    return type(x).__module__.partition(".")[0]
