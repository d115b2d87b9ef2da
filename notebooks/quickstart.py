# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: prune a model while it trains
#
# We train LeNet-300-100 on the handwritten digits that scikit-learn ships, prune 95% of its weights on the way, look at
# every layer's sparsity curve, and load the checkpoint into the plain model.

# %%
# %matplotlib inline
import logging
import warnings

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_autoprune import AutoPruneCallback, layer_sparsity, sparsity
from lightning_autoprune.demo.data import load_digits, make_loader
from lightning_autoprune.demo.networks import Classifier, lenet_300_100
from lightning_autoprune.plots import input_survivors, read_curves, sparsity_curves

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
output = "quickstart-output"

# %% [markdown]
# ## Train
#
# Nothing of the model or the data is changed. The callback is the one new line; `target_sparsity` may be left out, and
# the pressure alone then decides how far to prune.

# %%
seed_everything(0, verbose=False)
digits = load_digits()
model = Classifier(lenet_300_100(pixels=64))
prune = AutoPruneCallback(target_sparsity=0.95)
checkpoint = ModelCheckpoint(dirpath=output, filename="pruned", enable_version_counter=False)
logger = CSVLogger(output, name="logs", version=0)  # or WandbLogger, TensorBoardLogger, several, none
trainer = Trainer(
    max_epochs=40,
    accelerator="cpu",
    callbacks=[prune, checkpoint],
    logger=logger,
    log_every_n_steps=10,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, make_loader(digits.train, 32, shuffle=True))
(result,) = trainer.test(model, make_loader(digits.test, 797), verbose=False)
print(f"sparsity {prune.sparsity:.2%}, error {result['test_error']:.2f}%")

# %% [markdown]
# ## Look at the curves
#
# Every layer's sparsity is logged as `autoprune/sparsity/<layer>`. No layer was told how much to keep: what the last
# layer needs, it keeps.

# %%
curves = read_curves(f"{logger.log_dir}/metrics.csv")
sparsity_curves(curves)

# %% [markdown]
# Which pixels does the pruned network still read?

# %%
input_survivors(model.network[1].weight, (8, 8))

# %% [markdown]
# ## Load the checkpoint into the plain model
#
# The file holds true zeros under the model's own keys, so it loads strictly and needs nothing of this package.

# %%
plain = Classifier(lenet_300_100(pixels=64))
plain.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"], strict=True)
print(f"all layers: {sparsity(plain):.2%} zeros")
for name, value in layer_sparsity(plain).items():
    print(f"{name:>10}: {value:.2%} zeros")

# %%
images = digits.test.images
assert torch.equal(plain(images), model(images))
assert curves["all"][-1][1] > 0.94
print("same outputs")
