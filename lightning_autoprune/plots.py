"""Pictures of a pruning run, as matplotlib figures."""

from lightning_autoprune.reporting.plots import *  # noqa: F403
from lightning_autoprune.reporting.plots import __all__ as __all__
