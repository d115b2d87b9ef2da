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
# We train LeNet-300-100 on the handwritten digits that come with scikit-learn: 1,000 images to train on, 797 to test
# on. During training, 95% of the weights are pruned. Then we look at the sparsity curve of each layer, and load the
# checkpoint into the plain model.

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
# The callback is the only new line: the model and the data do not change. Without `target_sparsity`, the pressure
# alone decides how many weights are pruned.

# %%
seed_everything(0, verbose=False)
digits = load_digits()
model = Classifier(lenet_300_100(pixels=64))
prune = AutoPruneCallback(target_sparsity=0.95)
checkpoint = ModelCheckpoint(dirpath=output, filename="pruned", enable_version_counter=False)
logger = CSVLogger(output, name="logs", version=0)  # or WandbLogger, TensorBoardLogger, several loggers, none
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
wrong = round(result["test_error"] / 100 * len(digits.test))
print(f"sparsity {prune.sparsity:.2%}, error {result['test_error']:.2f}% ({wrong} of {len(digits.test)} images)")

# %% [markdown]
# ## Look at the curves
#
# The sparsity of each layer is logged as `autoprune/layer_sparsity/<layer>`. No layer has a target of its own: the
# method finds out that the last layer needs a larger share of its weights.

# %%
curves = read_curves(f"{logger.log_dir}/metrics.csv")
sparsity_curves(curves)

# %% [markdown]
# The pixels that the pruned network still reads:

# %%
input_survivors(model.network[1].weight, (8, 8))

# %% [markdown]
# ## Load the checkpoint into the plain model
#
# The file has zeros in place of the pruned weights, under the model's own keys. It loads with `strict=True`, and this
# package is not needed to load it.

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
