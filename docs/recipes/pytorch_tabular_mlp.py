"""pytorch-tabular: prune a network on a table; the callback is passed to `fit`."""

import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from lightning_autoprune import AutoPruneCallback, sparsity

random = np.random.default_rng(0)
numbers = [f"x{i}" for i in range(6)]
table = pd.DataFrame(random.normal(size=(512, 6)), columns=numbers)
table["kind"] = random.choice(list("abc"), 512)
table["y"] = (table.x0 + (table.kind == "a") > 0).astype(int)

trainer_config = TrainerConfig(
    batch_size=64, max_epochs=10, accelerator="cpu", early_stopping=None, load_best=False, checkpoints=None
)
model = TabularModel(
    data_config=DataConfig(target=["y"], continuous_cols=numbers, categorical_cols=["kind"]),
    model_config=CategoryEmbeddingModelConfig(task="classification", layers="32-16"),
    optimizer_config=OptimizerConfig(),
    trainer_config=trainer_config,
)
callback = AutoPruneCallback(target_sparsity=0.8)
model.fit(train=table, callbacks=[callback])
print(f"sparsity {sparsity(model.model):.3f}")
