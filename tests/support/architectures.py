"""Small networks of many architectures, each with the shape of an input, for tests that change a network's layers."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_autoprune.demo.networks import lenet5


class Residual(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet():
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    blocks = Residual(8, 12, 2), Residual(12, 16, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: wide, depthwise, narrow, with a residual where sizes allow."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        wide = 3 * inside
        self.adds = stride == 1 and inside == outside
        self.layers = nn.Sequential(
            nn.Conv2d(inside, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet():
    stem = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6()
    blocks = InvertedResidual(6, 8, 1), InvertedResidual(8, 8, 1), InvertedResidual(8, 10, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=48, batch_first=True)
        self.embed, self.layers = nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 3))

    def forward(self, x):
        return self.head(self.layers(self.embed(x)).mean(1))


class DenseBlock(nn.Module):
    """Concatenates the outputs of all earlier layers, as DenseNet does."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(11, 7, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(18), nn.Linear(18, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.a(x))], 1)
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(F.relu(self.norm(x)).amax((2, 3)))


def upsampler():
    layers = nn.Linear(6, 40), nn.PReLU(40), nn.Unflatten(1, (10, 2, 2)), nn.ConvTranspose2d(10, 8, 3, 2), nn.ReLU()
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 7, 2), nn.Tanh(), nn.Conv2d(7, 2, 1))


def signals():
    layers = nn.Conv1d(2, 12, 5), nn.BatchNorm1d(12), nn.PReLU(12), nn.Conv1d(12, 9, 3, padding=1), nn.Sigmoid()
    return nn.Sequential(*layers, nn.AvgPool1d(4), nn.Flatten(), nn.Linear(9 * 4, 11), nn.Tanh(), nn.Linear(11, 2))


def volumes():
    layers = nn.Conv3d(1, 6, 3), nn.ReLU(), nn.Conv3d(6, 5, 2), nn.ELU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(5 * 27, 3))


EXACT = {
    "lenet5": (lenet5, (1, 28, 28)),
    "resnet": (resnet, (3, 16, 16)),
    "mobilenet": (mobilenet, (3, 16, 16)),
    "encoder": (Encoder, (5, 6)),
    "dense": (DenseBlock, (3, 9, 9)),
    "signals": (signals, (2, 20)),
    "volumes": (volumes, (1, 6, 6, 6)),
}


class Shuffled(nn.Module):
    """Reads channels in another order than they are made, which the graph does not show."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).relu().flip(-1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 12), nn.Linear(6, 3)

    def forward(self, x):
        values, gates = self.a(x).chunk(2, -1)
        return self.b(values * gates.sigmoid())


class InputFirst(nn.Module):
    """Concatenates the input in front of a layer's channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(9, 2, 1)

    def forward(self, x):
        return self.b(torch.cat([x, self.a(x)], 1)).mean((2, 3))


class FunctionalUse(nn.Module):
    """Uses a layer's weight without the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return F.linear(F.relu(self.a(x)), self.b.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(F.relu(self.a(x)) * F.relu(self.b(2 * x)))


class UsedTwice(nn.Module):
    """Uses one layer twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))))


class FixedHeads(nn.Module):
    """A causal attention block with the number of heads written into the code."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.project = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class CountedHeads(nn.Module):
    """An attention block with the number of heads in an attribute, and its heads in one of the usual layouts."""

    def __init__(self, kind="fused", heads=4):
        super().__init__()
        self.kind, self.heads, self.inner = kind, heads, 16
        self.embed = nn.Linear(6, 12)
        if kind == "separate":
            self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 16, bias=False), nn.Linear(12, 16)
        else:
            self.qkv = nn.Linear(12, 48)
        self.out, self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        x = self.embed(x)
        if self.kind == "separate":
            parts = [layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v)]
        elif self.kind == "interleaved":
            parts = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).unbind(-2)
        else:
            split = self.qkv(x).split(self.inner, -1) if self.kind == "counted" else self.qkv(x).chunk(3, -1)
            parts = [part.unflatten(-1, (self.heads, -1)) for part in split]
        q, k, v = (part.transpose(1, 2) for part in parts)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return self.last(x + self.down(F.gelu(self.up(x))))


HEAD_KINDS = ("fused", "interleaved", "separate", "counted")

# Networks in which channels must stay: torch-pruning's graph is wrong or stops, or a channel can't be removed alone.
DIFFICULT = {
    "shuffled": (Shuffled, (5,)),
    "gated": (Gated, (5,)),
    "input first": (InputFirst, (3, 6, 6)),
    "functional": (FunctionalUse, (5,)),
    "tied": (Tied, (5,)),
    "twice": (UsedTwice, (5,)),
    "attention": (FixedHeads, (7, 16)),
    "upsampler": (upsampler, (6,)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)), (4, 8, 8)),
    "normalized": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 3)), (3, 8, 8)),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Softmax(-1), nn.Linear(9, 2)), (4,)),
}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)


class LoopOverSamples(TwoLayers):
    """Loops over the samples."""

    def forward(self, x):
        return torch.stack([self.b(torch.relu(self.a(sample))) for sample in x])


class DividedByBatchSize(TwoLayers):
    """Divides by the batch size of the example as a plain number."""

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).sum(0, keepdim=True) / torch.tensor(float(int(x.shape[0])))


class Masked(TwoLayers):
    """Takes a mask, which may have no dimension of samples."""

    def forward(self, x, mask):
        return self.b(torch.relu(self.a(x)) * mask)


def prune_randomly(network, density, seed=0):
    """Zero all but a fraction of each weight, and give BatchNorm the statistics of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        elif isinstance(weight, nn.Parameter) and weight.dim() > 1:
            weight.data[torch.rand(weight.shape, generator=generator) >= density] = 0
    return network


def assert_same_outputs(a, b, shape, samples=1000, seed=1):
    """Assert that two networks give the same outputs on random inputs in evaluation mode, within rounding."""
    inputs = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        one, two = copy.deepcopy(a).eval()(inputs), copy.deepcopy(b).eval()(inputs)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * max(1.0, float(one.abs().max())))
