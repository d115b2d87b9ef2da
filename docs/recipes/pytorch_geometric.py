"""PyTorch Geometric: prune a graph attention network that classifies graphs of different sizes."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.nn import functional as F  # noqa: N812
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GATConv, Linear, global_mean_pool

from lightning_autoprune import AutoPruneCallback, sparsity


class GraphNet(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = GATConv(16, 16, heads=2), GATConv(32, 16, heads=2), Linear(32, 2)

    def training_step(self, batch, batch_idx):
        x = self.first(batch.x, batch.edge_index).relu()
        x = self.second(x, batch.edge_index).relu()
        loss = F.cross_entropy(self.head(global_mean_pool(x, batch.batch)), batch.y)
        self.log("train_loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def random_graph():
    nodes = int(torch.randint(4, 12, ()))
    x, edges = torch.randn(nodes, 16), torch.randint(nodes, (2, 3 * nodes))
    return Data(x=x, edge_index=edges, y=(x[:, 0].mean() > 0).long().view(1))


seed_everything(0)
train_loader = DataLoader([random_graph() for _ in range(128)], batch_size=16, shuffle=True)
model = GraphNet()
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = Trainer(max_epochs=10, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(model, train_loader)
print(f"sparsity {sparsity(model):.3f}")
