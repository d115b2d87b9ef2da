"""pytorch-forecasting: prune the Temporal Fusion Transformer."""

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer, seed_everything
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

from lightning_autoprune import AutoPruneCallback, sparsity

seed_everything(0)
waves = [np.sin(np.arange(100) / (3 + i)) for i in range(4)]
frames = [pd.DataFrame({"series": f"{i}", "time": range(100), "y": y}) for i, y in enumerate(waves)]
dataset = TimeSeriesDataSet(
    pd.concat(frames, ignore_index=True),
    time_idx="time",
    target="y",
    group_ids=["series"],
    max_encoder_length=20,
    max_prediction_length=5,
    static_categoricals=["series"],
    time_varying_known_reals=["time"],
    time_varying_unknown_reals=["y"],
)
model = TemporalFusionTransformer.from_dataset(dataset, hidden_size=8, attention_head_size=2, learning_rate=1e-2)
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = Trainer(max_epochs=4, accelerator="cpu", logger=False, gradient_clip_val=0.1, callbacks=[callback])
trainer.fit(model, dataset.to_dataloader(train=True, batch_size=32))
print(f"sparsity {sparsity(model):.3f}")
