"""Detection: prune a detector whose batches are lists of images of different sizes, and of targets."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset

from lightning_autoprune import AutoPruneCallback, sparsity


class Boxes(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        random = torch.Generator().manual_seed(index)
        size, count = (int(torch.randint(*ends, (), generator=random)) for ends in ((24, 40), (0, 4)))
        corners = torch.rand(count, 2, generator=random) * size / 2
        boxes = torch.cat([corners, corners + 4 + torch.rand(count, 2, generator=random) * size / 3], 1)
        image = 0.1 * torch.randn(3, size, size, generator=random)
        for x0, y0, x1, y1 in boxes.long().tolist():
            image[:, y0:y1, x0:x1] += 1
        return image, {"boxes": boxes, "labels": torch.ones(count, dtype=torch.long), "image_id": index}


class Detector(LightningModule):
    """Per cell of 4 × 4 pixels, it gives a score for the center of an object, and the box."""

    def __init__(self):
        super().__init__()
        norms = nn.BatchNorm2d(16), nn.BatchNorm2d(32)
        convolutions = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.backbone = nn.Sequential(convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1], nn.ReLU())
        self.head = nn.Conv2d(32, 5, 1)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        size = max(max(image.shape) for image in images)
        x = torch.stack([F.pad(i, (0, size - i.shape[2], 0, size - i.shape[1])) for i in images])
        losses = []
        for out, target in zip(self.head(self.backbone(x)), targets, strict=True):
            is_center = torch.zeros_like(out[0])
            columns, rows = ((target["boxes"][:, :2] + target["boxes"][:, 2:]) / 8).long().unbind(1)
            is_center[rows, columns] = 1
            losses.append(F.binary_cross_entropy_with_logits(out[0], is_center))
            if len(rows):
                losses.append(F.smooth_l1_loss(out[1:, rows, columns].T, target["boxes"] / 40))
        return torch.stack(losses).sum() / len(images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def collate(samples):
    return tuple(zip(*samples, strict=True))


seed_everything(0)
train_loader = DataLoader(Boxes(), batch_size=8, shuffle=True, collate_fn=collate)
model = Detector()
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = Trainer(max_epochs=10, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(model, train_loader)
print(f"sparsity {sparsity(model):.3f}")
