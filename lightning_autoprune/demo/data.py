"""Images of handwritten digits, as tensors in memory: MNIST, or the small set that scikit-learn ships."""

from __future__ import annotations

import gzip
import hashlib
import math
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_autoprune.training.lightning_package import LightningDataModule

__all__ = ["DataError", "DigitImages", "DigitsData", "Split", "load_digits", "load_mnist", "make_loader"]

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of the decompressed files: mirrors compress them differently.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

_Batch = TypeVar("_Batch")


class DataError(RuntimeError):
    """Data that can't be loaded, or is not what it should be."""


@dataclass
class Split(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels in memory, from which a loader takes whole batches.

    Attributes:
        images: float32, shape (samples, 1, height, width), normalized by the mean and standard deviation of the
            training images.
        labels: int64, shape (samples,), 0 to 9.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch; DataLoader calls this instead of indexing sample by sample."""
        return self.images[indices], self.labels[indices]


@dataclass
class DigitImages:
    """A dataset of digits: its name, and its splits for training and testing."""

    name: str
    train: Split
    test: Split


def make_loader(
    split: Split, batch_size: int, shuffle: bool = False, sampler: Sampler[int] | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a loader of batches (images, labels), in the sampler's order if one is given."""
    return DataLoader(split, batch_size=batch_size, shuffle=shuffle, sampler=sampler, collate_fn=_return_unchanged)


def load_digits() -> DigitImages:
    """Load the 1,797 digits of 8×8 pixels that scikit-learn ships, and split them: 1,000 to train on, 797 to test on.

    The split is random, but always the same.

    Raises:
        DataError: if scikit-learn is not installed.

    Source:
        Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise DataError("The digits come with scikit-learn: pip install 'lightning-autoprune[demo]'.") from error

    data, target = load(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return _normalize("digits", images[train], labels[train], images[test], labels[test])


class DigitsData(LightningDataModule):
    """The digits of :func:`load_digits` for a configuration file: 800 to train, 200 to validate, 797 to test on.

    Args:
        batch_size: samples per training batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.digits = load_digits()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the training batches, shuffled in each epoch."""
        return make_loader(Split(*self.digits.train[:800]), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all validation samples as one batch."""
        return make_loader(Split(*self.digits.train[800:]), 200)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return all test samples as one batch."""
        return make_loader(self.digits.test, 797)


def load_mnist(directory: str | Path) -> DigitImages:
    """Load MNIST from its IDX files, which are downloaded if they are not there.

    MNIST has 60,000 digits to train on and 10,000 to test on, of 28×28 pixels.

    Args:
        directory: where the four files are or will be saved, gzip-compressed or not.

    Raises:
        DataError: if a file can't be downloaded, or is not the one that MNIST has.
    """
    folder = Path(directory)
    arrays = [_parse_idx(_read_or_download(folder, name), name) for name in MNIST_FILES]
    images, labels, test_images, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    return _normalize(
        "mnist",
        images.float().unsqueeze(1),
        labels.long(),
        test_images.float().unsqueeze(1),
        test_labels.long(),
    )


def _return_unchanged(batch: _Batch) -> _Batch:
    """Return what `Split.__getitems__` gave: it is a batch already, so there is nothing to collate."""
    return batch


def _normalize(name: str, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> DigitImages:
    mean, std = images.mean(), images.std()
    return DigitImages(name, Split((images - mean) / std, labels), Split((test_images - mean) / std, test_labels))


def _read_or_download(folder: Path, name: str) -> bytes:
    for path in (folder / f"{name}.gz", folder / name):
        if path.exists():
            return _decompress_and_verify(path.read_bytes(), name, str(path))
    packed = _download(f"{name}.gz", folder)
    content = _decompress_and_verify(packed, name, "the download")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.gz").write_bytes(packed)
    return content


def _decompress_and_verify(raw: bytes, name: str, source: str) -> bytes:
    try:
        content = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"{source} is not a complete gzip file ({error}): delete it and try again.") from error
    if hashlib.sha256(content).hexdigest() != MNIST_FILES[name]:
        raise DataError(f"{source} is not MNIST's {name}: its SHA-256 differs. Delete it and try again.")
    return content


def _download(file: str, folder: Path) -> bytes:
    errors = []
    for mirror in MNIST_MIRRORS:
        try:
            with urllib.request.urlopen(mirror + file, timeout=60) as response:
                content: bytes = response.read()
                return content
        except (urllib.error.URLError, OSError) as error:
            errors.append(f"{mirror + file}: {error}")
    raise DataError(
        f"{file} is not in {folder} and could not be downloaded ({'; '.join(errors)}). Put MNIST's four IDX files"
        " there, or name the directory that has them (`--data-dir`)."
    )


def _parse_idx(content: bytes, name: str) -> np.ndarray:
    """Return the array of an IDX file: two zero bytes, type 8 (unsigned byte), number of dimensions, sizes, data."""
    dimensions = content[3]
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if content[:3] != b"\0\0\x08" or data.size != math.prod(shape):
        raise DataError(f"{name} is not an IDX file of unsigned bytes.")
    return data.reshape(shape)
