"""Iterable datasets: a stream of tensors, and one of dictionaries with text."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_autoprune import AutoPruneCallback, sparsity


class Stream(IterableDataset):
    def __init__(self, names):
        self.names = names

    def __iter__(self):
        for i in range(128):
            x = torch.randn(8, generator=torch.Generator().manual_seed(i))
            sample = {"x": x, "y": int(x[0] > 0)}
            yield {**sample, "name": f"sample {i}"} if self.names else sample


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


for names in (False, True):
    seed_everything(0)
    model = Net()
    callback = AutoPruneCallback(target_sparsity=0.8)
    trainer = Trainer(max_steps=64, accelerator="cpu", logger=False, callbacks=[callback])
    trainer.fit(model, DataLoader(Stream(names), batch_size=16))
    print(f"sparsity {sparsity(model):.3f}")
