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
# # Your own model: a character transformer
#
# A causal transformer with two layers, defined below, learns the text of Python's language reference, and 90% of its
# weights are pruned during training. The run is stopped in the middle and resumed. Then the model is shrunk, saved and
# exported.

# %%
# %matplotlib inline
import gzip
import logging
import re
import textwrap
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_autoprune import AutoPruneCallback, export_onnx, load_sparse_into, model_cost, save_sparse, shrink
from lightning_autoprune.plots import read_curves, sparsity_curves, sparsity_heatmap

warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
temporary = TemporaryDirectory()  # removed when the kernel stops
folder = Path(temporary.name)
BATCHES = 400  # per epoch

# %% [markdown]
# ## The text
#
# The text comes with Python, for `help`. We keep lower-case letters, periods, commas and single spaces, and cut it into
# windows of 65 characters: the model reads the first 64, and at each place it predicts the next one.

# %%
CONTEXT = 64
text = re.sub("[^a-z.,]+", " ", " ".join(topics[name] for name in sorted(topics)).lower())
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text])
windows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
train, val = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :]
print(f"{len(text):,} characters, {len(alphabet)} of them different")
print(f"{len(train)} windows to train on, {len(val)} to validate on; the first of these:")
print("".join(alphabet[code] for code in val[0]))

# %% [markdown]
# ## The model
#
# An ordinary LightningModule, with no code for pruning.


# %%
class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each after a LayerNorm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm2(x)).relu())


class CharacterModel(LightningModule):
    """A transformer that gives the logits of the next character at each place of a window."""

    def __init__(self, width=48, heads=4):
        super().__init__()
        self.characters, self.places = nn.Embedding(len(alphabet), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(alphabet))

    def forward(self, codes):
        x = self.characters(codes) + self.places.weight[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def compute_loss(self, windows):
        return cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def training_step(self, batch):
        return self.compute_loss(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# %% [markdown]
# ## Train, stop, resume
#
# The run has two epochs and is stopped after the first. `DistributedSampler`, which also works on one device, makes the
# order of the batches depend only on the epoch, so the resumed run sees the same batches as an unbroken one. We resume
# with a new model, whose initial weights are different; the checkpoint replaces them.


# %%
class StopAfterFirstEpoch(Callback):
    """Stops training after the first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def train_and_prune(name, seed, *callbacks, ckpt_path=None):
    """Train and prune a new model, and return it."""
    torch.manual_seed(seed)
    model, prune = CharacterModel(), AutoPruneCallback(target_sparsity=0.9)
    data = TensorDataset(train)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    trainer = Trainer(
        max_epochs=2,
        limit_train_batches=BATCHES,
        accelerator="cpu",
        callbacks=[prune, ModelCheckpoint(dirpath=folder / name, filename="last"), *callbacks],
        logger=CSVLogger(folder, name=name, version=0),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=12, sampler=sampler), ckpt_path=ckpt_path)
    print(f"{name:>8}: {trainer.global_step} steps, sparsity {prune.sparsity:.2%}")
    return model.eval()


train_and_prune("stopped", 0, StopAfterFirstEpoch())
model = train_and_prune("resumed", 1, ckpt_path=folder / "stopped" / "last.ckpt")

# %% [markdown]
# For comparison, the same run without a stop:

# %%
unbroken = train_and_prune("unbroken", 0).state_dict()
assert all(torch.equal(value, unbroken[name]) for name, value in model.state_dict().items())
print("all weights are equal, bit for bit")

# %% [markdown]
# ## The curves
#
# The logs of both parts, joined, equal those of the unbroken run.

# %%
stopped, resumed, whole = (
    read_curves(folder / name / "version_0" / "metrics.csv") for name in ("stopped", "resumed", "unbroken")
)
curves = {name: points + resumed[name] for name, points in stopped.items()}
assert curves == whole
sparsity_curves(curves)

# %%
sparsity_heatmap(curves)

# %% [markdown]
# ## What it learned
#
# The pruned model continues a text, character by character.


# %%
@torch.no_grad()
def continue_text(model, beginning, length, seed=0):
    """Continue a text; draw each character from the squared and renormalized probabilities of the model."""
    random = torch.Generator().manual_seed(seed)
    codes = [alphabet.index(character) for character in beginning]
    for _ in range(length):
        logits = model(torch.tensor([codes[-CONTEXT:]]))[0, -1]
        codes.append(int(torch.multinomial((2 * logits).softmax(0), 1, generator=random)))
    return "".join(alphabet[code] for code in codes)


with torch.no_grad():
    print(f"loss on the validation windows: {model.compute_loss(val):.3f} nats per character\n")
print(textwrap.fill(continue_text(model, "the function ", 400), 100))

# %% [markdown]
# ## Smaller files, a smaller model
#
# `save_sparse` stores no zeros. `shrink` removes dead channels, such as neurons without any weights. `export_onnx`
# writes the shrunk model; its file stores zeros like other values. All of them give the outputs of the pruned model:
# the sparse file exactly, the others up to rounding.

# %%
example = val[:4, :-1]
with torch.no_grad():
    outputs = model(example)

torch.save(model.state_dict(), folder / "plain.pt")
(folder / "plain.pt.gz").write_bytes(gzip.compress((folder / "plain.pt").read_bytes()))
save_sparse(model, folder / "pruned.safetensors")
small = shrink(model, example)
save_sparse(small, folder / "shrunk.safetensors")
export_onnx(model, folder / "shrunk.onnx", example)
for name in ("plain.pt", "plain.pt.gz", "pruned.safetensors", "shrunk.safetensors", "shrunk.onnx"):
    print(f"{name:>18}: {(folder / name).stat().st_size / 1024:6.1f} KiB")
print(small.blocks)

# %%
loaded = CharacterModel().eval()
load_sparse_into(loaded, folder / "pruned.safetensors")
session = onnxruntime.InferenceSession(folder / "shrunk.onnx")
(onnx_outputs,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
with torch.no_grad():
    results = {"from the file": loaded(example), "shrunk": small(example), "ONNX": torch.from_numpy(onnx_outputs)}
for name, result in results.items():
    print(f"{name:>13}: largest difference {float((result - outputs).abs().max()):.1e}")

before, after = model_cost(model, example), model_cost(small, example)
print(f"FLOPs: {before.flops:,} dense, {after.flops:,} shrunk, {after.effective_flops:,} with nonzero weights")

# %%
assert torch.equal(results["from the file"], outputs)
assert all(torch.allclose(result, outputs, rtol=1e-3, atol=1e-3) for result in results.values())
print("resumed as if never stopped, same outputs from the file, the shrunk model and ONNX")
