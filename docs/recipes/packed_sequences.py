"""An LSTM on packed sequences: a batch is a PackedSequence and the labels."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, sparsity


class Tagger(LightningModule):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32, batch_first=True, bidirectional=True), nn.Linear(64, 2)

    def training_step(self, batch, batch_idx):
        sequences, labels = batch
        out, lengths = pad_packed_sequence(self.lstm(sequences)[0], batch_first=True)
        return nn.functional.cross_entropy(self.head(out.sum(1) / lengths.view(-1, 1).to(out)), labels)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def collate(samples):
    sequences, labels = zip(*samples, strict=True)
    return pack_sequence(sequences, enforce_sorted=False), torch.tensor(labels)


seed_everything(0)
sequences = [torch.randn(length, 8) for length in torch.randint(2, 12, (128,)).tolist()]
samples = [(sequence, int(sequence[:, 0].sum() > 0)) for sequence in sequences]
train_loader = DataLoader(samples, batch_size=16, shuffle=True, collate_fn=collate)
model = Tagger()
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = Trainer(max_epochs=8, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(model, train_loader)
print(f"sparsity {sparsity(model):.3f}")
