"""neuralforecast: prune NHITS; the model passes the callback on to its Trainer."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

from lightning_autoprune import AutoPruneCallback, sparsity

dates = pd.date_range("2024-01-01", periods=200)
waves = [np.sin(np.arange(200) / (4 + i)) for i in range(8)]
table = pd.concat([pd.DataFrame({"unique_id": f"series {i}", "ds": dates, "y": y}) for i, y in enumerate(waves)])

callback = AutoPruneCallback(target_sparsity=0.8)
model = NHITS(
    h=12,
    input_size=24,
    mlp_units=3 * [[32, 32]],
    max_steps=60,
    batch_size=8,
    accelerator="cpu",
    callbacks=[callback],
)
forecast = NeuralForecast(models=[model], freq="D")
forecast.fit(table)
forecast.predict()
print(f"sparsity {sparsity(forecast.models[0]):.3f}")
