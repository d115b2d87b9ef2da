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
