"""darts: prune N-BEATS; the callback is passed in `pl_trainer_kwargs`."""

import numpy as np
from darts import TimeSeries
from darts.models import NBEATSModel

from lightning_autoprune import AutoPruneCallback

noise = np.random.default_rng(0).normal(0, 0.1, 400)
series = TimeSeries.from_values((np.sin(np.arange(400) / 5) + noise).astype("float32"))
callback = AutoPruneCallback(target_sparsity=0.8)
model = NBEATSModel(
    input_chunk_length=24,
    output_chunk_length=6,
    layer_widths=32,
    n_epochs=8,
    pl_trainer_kwargs={"accelerator": "cpu", "callbacks": [callback]},
)
model.fit(series)
model.predict(6)
print(f"sparsity {callback.sparsity:.3f}")
