"""Kinds of layers and whole models, each pruned under a Trainer without a change to its code."""

from __future__ import annotations

import pytest
import torch
from architectures import Encoder, mobilenet, resnet
from helpers import fit, flat
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_autoprune import AutoPruneCallback, prunable_weights, sparsity


class Lit(LightningModule):
    """Trains any network to predict the sign of the first entry of its input."""

    def __init__(self, network, classes=2):
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x):
        y = self.network(x)
        y = getattr(y, "logits", y)
        return y.flatten(1)[:, : self.classes]

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def images(*shape, samples=64):
    x = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.flatten(1)[:, 0] > 0).long()), 16)


def tokens(samples=64, length=6, words=20):
    x = torch.randint(words, (samples, length), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x[:, 0] > words // 2).long()), 16)


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer, self.head = kind(6, 12, num_layers=2, batch_first=True, **options), nn.LazyLinear(2)
        self.head(self.layer(torch.zeros(1, 2, 6))[0])

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(6, 12), nn.Linear(12, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 12)
        for i in range(x.shape[1]):
            h = self.cell(x[:, i], h)
        return self.head(h)


class Tied(nn.Module):
    """An embedding that shares its weight with the output layer, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(torch.relu(self.inner(torch.relu(self.inner(self.embed(x).mean(1))))))


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "num_labels": 2, "pad_token_id": 0}
    if name == "Bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **small
        )
        return transformers.BertForSequenceClassification(config)
    if name == "GPT2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **small)
        return transformers.GPT2ForSequenceClassification(config)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **small
    )
    return transformers.LlamaForSequenceClassification(config)


def vision(name, **options):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision may be built for another torch
        pytest.skip(f"timm: {error}")
    return timm.create_model(name, num_classes=2, **options)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), lambda: images(8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 6)), lambda: images(3, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Conv3d(6, 2, 2)), lambda: images(1, 4, 4, 4)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 6)),
        lambda: images(3, 4, 4),
    ),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 4)),
        lambda: images(4, 6, 6),
    ),
    "depthwise": (mobilenet, lambda: images(3, 16, 16)),
    "resnet": (resnet, lambda: images(3, 16, 16)),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), lambda: images(5, 6)),
    "lstm with projections": (lambda: Recurrent(nn.LSTM, proj_size=4), lambda: images(5, 6)),
    "gru": (lambda: Recurrent(nn.GRU, dropout=0.1), lambda: images(5, 6)),
    "cells": (Cells, lambda: images(5, 6)),
    "transformer encoder": (Encoder, lambda: images(5, 6)),
    "tied": (Tied, tokens),
    "Bert": (lambda: hugging_face("Bert"), tokens),
    "GPT2": (lambda: hugging_face("GPT2"), tokens),
    "Llama": (lambda: hugging_face("Llama"), tokens),
    "timm vit": (
        lambda: vision("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_heads=3),
        lambda: images(3, 16, 16),
    ),
    "timm resnet": (lambda: vision("resnet10t"), lambda: images(3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_pruned_to_the_target_and_its_state_loads_into_the_plain_model(name):
    make, data = MODELS[name]
    torch.manual_seed(0)
    callback = AutoPruneCallback(target_sparsity=0.8)
    model, _ = fit(callback, Lit(make()), data(), epochs=5)
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    assert sparsity(model) == pytest.approx(0.8, abs=1 / total)
    plain = Lit(make())
    plain.load_state_dict(model.state_dict())
    x = next(iter(data()))[0]
    with torch.no_grad():  # the fast path of attention too
        torch.testing.assert_close(plain.eval()(x), model.eval()(x))
    assert len(callback.layer_sparsity()) == len(prunable_weights(model))


def test_an_included_embedding_is_pruned_together_with_the_layer_it_is_tied_to():
    torch.manual_seed(0)
    model, _ = fit(AutoPruneCallback(target_sparsity=0.8, include=["network.*"]), Lit(Tied()), tokens(), epochs=5)
    weights = prunable_weights(model, ["*"])
    assert list(weights) == ["network.embed", "network.inner"]
    assert sparsity(weights) == pytest.approx(0.8, abs=0.002)
    assert model.network.out.weight is model.network.embed.weight
    assert sparsity(model.network.embed.weight) > 0.5


@pytest.mark.parametrize("held_out", [0.25, "train"])
def test_a_compiled_network_is_not_recompiled_when_masks_change(held_out):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(callback.sparsity)
        return graph.forward

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    model = Lit(torch.compile(network, backend=backend))
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out)

    class Masks(Callback):
        def __init__(self):
            self.sparsities, self.compiled = set(), []

        def on_train_batch_end(self, *_):
            self.sparsities.add(callback.sparsity)
            self.compiled.append(len(compiled))

    masks = Masks()
    fit([callback, masks], model, images(8), epochs=8)
    assert len(masks.sparsities) > 5
    assert 0 < len(compiled) <= (1 if held_out == "train" else 4)
    assert masks.compiled[-1] == masks.compiled[12]  # none since the first steps of pruning
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


def test_a_compiled_module_trains_to_the_same_weights_as_the_plain_one():
    def run(compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        model = Lit(torch.compile(network, backend="eager") if compiled else network)
        fit(AutoPruneCallback(target_sparsity=0.8), model, images(8), epochs=4)
        return flat(network)

    assert torch.equal(run(True), run(False))
