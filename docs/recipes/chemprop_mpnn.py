"""chemprop: prune a message-passing network, with its own dataset and loader."""

from chemprop import data, models, nn
from lightning import pytorch as pl

from lightning_autoprune import AutoPruneCallback, sparsity

pl.seed_everything(0)
smiles = ["C" * n + tail for n in range(1, 13) for tail in ("", "O", "N", "C(=O)O", "c1ccccc1", "Cl", "F", "C#N")]
dataset = data.MoleculeDataset([data.MoleculeDatapoint.from_smi(s, [float(len(s))]) for s in smiles])
dataset.normalize_targets()
train_loader = data.build_dataloader(dataset, batch_size=32)

mpnn = models.MPNN(nn.BondMessagePassing(), nn.MeanAggregation(), nn.RegressionFFN(), batch_norm=True)
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = pl.Trainer(max_epochs=20, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(mpnn, train_loader)
print(f"sparsity {sparsity(mpnn):.3f}")
