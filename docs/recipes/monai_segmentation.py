"""MONAI: prune a UNet that is trained on dictionaries of MetaTensors."""

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, RandFlipd, ScaleIntensityd

from lightning_autoprune import AutoPruneCallback, sparsity


class Segmentation(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = UNet(spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2))
        self.loss = DiceLoss(sigmoid=True)

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def sample(random):
    image = random.normal(size=(32, 32)).astype("float32")
    image[8:20, 8:20] += 2
    return {"image": image, "label": (image > 1).astype("float32")}


seed_everything(0)
random = np.random.default_rng(0)
keys = ["image", "label"]
transforms = Compose(
    [
        EnsureChannelFirstd(keys, channel_dim="no_channel"),
        EnsureTyped(keys),
        ScaleIntensityd("image"),
        RandFlipd(keys, prob=0.5, spatial_axis=0),
    ]
)
train_loader = DataLoader(CacheDataset([sample(random) for _ in range(48)], transforms), batch_size=8, shuffle=True)
model = Segmentation()
callback = AutoPruneCallback(target_sparsity=0.8)
trainer = Trainer(max_epochs=8, accelerator="cpu", logger=False, callbacks=[callback])
trainer.fit(model, train_loader)
print(f"sparsity {sparsity(model):.3f}")
