"""Networks beyond those of the package's demo; only their linear layers and convolutions have prunable weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, and a shortcut (He et al., 2016), which halve height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / 2, width / 2)."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def small_resnet() -> nn.Sequential:
    """Return a ResNet for images of 28×28 pixels, with 77,424 prunable weights in 11 layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16),
        ResidualBlock(16, 32),
        ResidualBlock(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Sequential:
    """Return three linear layers for 30 measurements, with 20,480 prunable weights."""
    return nn.Sequential(nn.Linear(30, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


class AttentionBlock(nn.Module):
    """Causal self-attention and a feed-forward part, each normalized first (Vaswani et al., 2017; pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        query_key_value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*query_key_value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """A causal transformer on characters: 2 blocks of width 64, 104,448 prunable weights (embeddings stay dense)."""

    def __init__(self, alphabet: int = 96, context: int = 64, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(AttentionBlock(width, heads) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, alphabet)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits of the next characters (batch, length, alphabet) for codes (batch, length)."""
        x = self.tokens(codes) + self.positions(torch.arange(codes.size(1)))
        return self.head(self.norm(self.blocks(x)))


class CharBert(nn.Module):
    """A BERT from ``transformers``, untrained, that restores masked characters.

    It has 2 layers of width 64 with 4 heads, and 108,608 prunable weights; embeddings stay dense. The output layer has
    weights of its own, and there is no dropout.

    Raises:
        ModuleNotFoundError: if ``transformers`` is not installed.
    """

    def __init__(self, codes: int = 97, context: int = 64, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertForMaskedLM
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "This network comes from `transformers`: pip install 'lightning-autoprune[dev]', or leave its task out"
                " with `--tasks`."
            ) from error
        self.bert = BertForMaskedLM(
            BertConfig(
                vocab_size=codes,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=heads,
                intermediate_size=4 * width,
                max_position_embeddings=context,
                type_vocab_size=1,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                tie_word_embeddings=False,
            )
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits of all characters (batch, length, codes) for codes (batch, length)."""
        return self.bert(codes).logits


VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""Channels of the convolutions of the VGG-like network; 0 stands for a pooling that halves height and width."""


def vgg_like() -> nn.Sequential:
    """Return the VGG-like network for images of 32×32 pixels, with 14,977,728 prunable weights in 15 layers.

    It is the network of the pruning literature: VGG-16 (Simonyan and Zisserman, 2015) with BatchNorm and one hidden
    layer of 512 (Zagoruyko, 2015), here without dropout.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for width in VGG_WIDTHS:
        if width:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        else:
            layers.append(nn.MaxPool2d(2))
    hidden = [nn.Flatten(), nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    return _initialize(nn.Sequential(*layers, *hidden, nn.Linear(512, 10)))


def _norm_and_relu6(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """A wide depthwise 3×3 convolution between two 1×1 convolutions (Sandler et al., 2018).

    Args:
        inputs: channels of the input.
        outputs: channels of the output; the input is added if it has the same shape.
        stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution / channels of the input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = [nn.Conv2d(inputs, wide, 1, bias=False), *_norm_and_relu6(wide)] if expansion > 1 else []
        depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        project = [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*expand, depthwise, *_norm_and_relu6(wide), *project)
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        return x + self.layers(x) if self.adds_input else self.layers(x)


MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, number of blocks and first stride of each stage (Sandler et al., 2018, table 2)."""


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """Return MobileNet-V2 (Sandler et al., 2018) for images of 224×224 pixels, with 3,504,872 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), *_norm_and_relu6(32)]
    inputs = 32
    for expansion, channels, blocks, stride in MOBILENET_V2_STAGES:
        for i in range(blocks):
            layers.append(InvertedResidual(inputs, channels, 1 if i else stride, expansion))
            inputs = channels
    layers += [nn.Conv2d(inputs, 1280, 1, bias=False), *_norm_and_relu6(1280)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, classes)]
    return _initialize(nn.Sequential(*layers, *head))


def _initialize(network: nn.Sequential) -> nn.Sequential:
    """Give convolutions the initial weights of He et al. (2015), and linear layers small ones."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network
