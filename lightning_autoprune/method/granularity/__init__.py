"""What has an auxiliary parameter m: single weights, or whole channels."""

from collections.abc import Mapping
from typing import Literal

from lightning_autoprune.method.granularity.base import Granularity
from lightning_autoprune.method.granularity.layer_units import LayerUnits
from lightning_autoprune.method.granularity.neuron import NeuronGranularity
from lightning_autoprune.method.granularity.weight import WeightGranularity

__all__ = ["GRANULARITIES", "Granularity", "GranularityName", "LayerUnits", "NeuronGranularity", "WeightGranularity"]

GranularityName = Literal["weight", "neuron"]

GRANULARITIES: Mapping[str, type[Granularity]] = {"weight": WeightGranularity, "neuron": NeuronGranularity}
