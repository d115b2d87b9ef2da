"""The tasks of ``finetuning.py``: networks that are trained first, on data where they still make mistakes."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_autoprune.demo.data import load_mnist
from lightning_autoprune.demo.networks import lenet_300_100

from .networks import CharBert, small_resnet
from .tasks import ALPHABET, CONTEXT, TASKS, Data, Task, split_help_text
from .training import UNLABELED

TRAIN_IMAGES = 40_000  # fewer than MNIST has, which leaves more to learn


def clutter(images: Tensor, generator: torch.Generator, shift: int = 4, patch: int = 6, noise: float = 0.5) -> Tensor:
    """Return images that are shifted, partly covered and noisy, each in its own way.

    Args:
        images: shape (samples, 1, height, width), background at their minimum.
        generator: draws all that is random.
        shift: the most pixels that an image is moved by, up or down and left or right; what leaves it is lost.
        patch: side of the square, somewhere in the image, that the background covers.
        noise: standard deviation of the noise that is added to each pixel.
    """
    samples, _, height, width = images.shape
    background = float(images.min())
    padded = nn.functional.pad(images.squeeze(1), (shift,) * 4, value=background)
    sample, rows, columns = torch.arange(samples), torch.arange(height), torch.arange(width)
    top, left = torch.randint(2 * shift + 1, (2, samples, 1), generator=generator)
    shifted = padded[sample.view(-1, 1, 1), (top + rows).unsqueeze(2), (left + columns).unsqueeze(1)]
    top = torch.randint(height - patch + 1, (samples, 1), generator=generator)
    left = torch.randint(width - patch + 1, (samples, 1), generator=generator)
    covered_rows = (rows >= top) & (rows < top + patch)
    covered_columns = (columns >= left) & (columns < left + patch)
    shifted.masked_fill_(covered_rows.unsqueeze(2) & covered_columns.unsqueeze(1), background)
    return shifted.add_(torch.randn(shifted.shape, generator=generator), alpha=noise).unsqueeze(1)


@functools.cache
def cluttered_mnist(directory: Path) -> Data:
    """Return cluttered digits of MNIST, the same in every run: 40,000 to train on, 10,000 to test on."""
    mnist, generator = load_mnist(directory), torch.Generator().manual_seed(0)
    splits = []
    for images, labels in (mnist.train[:TRAIN_IMAGES], mnist.test[:]):
        cluttered = clutter(images, generator)
        splits.append((cluttered.contiguous(memory_format=torch.channels_last), labels))
    return Data(*splits)


MASK = ALPHABET
"""The code that stands for a masked character."""


def mask_characters(windows: Tensor, generator: torch.Generator, fraction: float = 0.15) -> tuple[Tensor, Tensor]:
    """Mask a random fraction of the characters, and return the inputs and the labels, which only they have."""
    masked = torch.rand(windows.shape, generator=generator) < fraction
    return windows.masked_fill(masked, MASK), windows.masked_fill(~masked, UNLABELED)


@functools.cache
def masked_help(directory: Path) -> Data:
    """Return windows of 64 characters from Python's help topics with 15% masked; the last tenth of the text tests.

    The windows to train on overlap: one begins at every 16th character, each with other masked characters.
    """
    generator, (train, test) = torch.Generator().manual_seed(0), split_help_text()
    windows = train.unfold(0, CONTEXT, CONTEXT // 4), test.unfold(0, CONTEXT, CONTEXT)
    return Data(*(mask_characters(split.contiguous(), generator) for split in windows))


FINETUNING_TASKS = {
    task.name: task
    for task in (
        Task("cluttered-lenet-300-100", cluttered_mnist, lenet_300_100, 10, 128, 1e-3, "error", ()),
        Task("cluttered-resnet", cluttered_mnist, small_resnet, 5, 128, 2e-3, "error", ()),
        TASKS["transformer"],
        Task("bert", masked_help, CharBert, 5, 32, 2e-3, "loss", ()),
    )
}
"""By name; a task's epochs and learning rate are those of the dense training."""
