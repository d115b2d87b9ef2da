"""CIFAR-10 and ImageNet, for the paper's larger networks, and the usual augmentation of small images.

CIFAR-10 is read from the archive of its binary version, which needs no unpickling. It is downloaded if it is missing.
ImageNet must be there already. It is decoded by torchvision, which is imported only then.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_autoprune.demo.data import DataError
from lightning_autoprune.deploy.atomic_write import atomic_write

from .data import Batch, Data, StreamedData

CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"
CIFAR10_URL = f"https://www.cs.toronto.edu/~kriz/{CIFAR10_ARCHIVE}"
CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CIFAR10_TRAIN = tuple(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = ("cifar-10-batches-bin/test_batch.bin",)
CIFAR10_SHAPE = (3, 32, 32)  # channels, rows, columns

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.cache
def cifar10(directory: Path) -> Data:
    """Return CIFAR-10: 50,000 training and 10,000 test images of 32×32 pixels (Krizhevsky, 2009).

    Each channel is normalized by the mean and standard deviation of the training images.

    Args:
        directory: where ``cifar-10-binary.tar.gz`` is or will be saved.

    Raises:
        DataError: if the archive can't be downloaded, or is not the one that the dataset has.
    """
    with tarfile.open(fileobj=io.BytesIO(_read_or_download(directory)), mode="r:gz") as archive:
        train, test = (_read_images(archive, names) for names in (CIFAR10_TRAIN, CIFAR10_TEST))
    mean = train[0].mean((0, 2, 3), keepdim=True)
    std = train[0].std((0, 2, 3), keepdim=True)
    layout = torch.channels_last
    splits = [
        (images.sub_(mean).div_(std).contiguous(memory_format=layout), labels) for images, labels in (train, test)
    ]
    return Data(*splits)


def _read_or_download(directory: Path) -> bytes:
    path = directory / CIFAR10_ARCHIVE
    if path.exists():
        content, source = path.read_bytes(), str(path)
    else:
        content, source = _download(directory), "the download"
    if hashlib.sha256(content).hexdigest() != CIFAR10_SHA256:
        raise DataError(f"{source} is not CIFAR-10's binary version: its SHA-256 differs. Delete it and try again.")
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    return content


def _download(directory: Path) -> bytes:
    try:
        with urllib.request.urlopen(CIFAR10_URL, timeout=60) as response:
            content: bytes = response.read()
            return content
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"{CIFAR10_ARCHIVE} is not in {directory} and could not be downloaded ({CIFAR10_URL}: {error}). Download"
            " CIFAR-10's binary version and put the archive there, not unpacked, or name the directory that has it"
            " (`--data-dir`)."
        ) from error


def _read_images(archive: tarfile.TarFile, names: tuple[str, ...]) -> Batch:
    """Return images and labels; each record is one byte for the label and one per channel, row and column."""
    size = 1 + np.prod(CIFAR10_SHAPE)
    files = [archive.extractfile(name) for name in names]
    records = np.concatenate([np.frombuffer(file.read(), np.uint8).reshape(-1, size) for file in files if file])
    images = torch.from_numpy(records[:, 1:].reshape(-1, *CIFAR10_SHAPE).astype(np.float32))
    return images, torch.from_numpy(records[:, 0].astype(np.int64))


def imagenet(directory: Path) -> StreamedData:
    """Return ImageNet's training and validation images, 224×224 pixels, with the usual augmentation for training.

    Args:
        directory: has the folders ``train/`` and ``val/``, each with one folder of images per class.

    Raises:
        DataError: if torchvision or a folder is missing.
    """
    missing = [str(directory / name) for name in ("train", "val") if not (directory / name).is_dir()]
    if missing:
        raise DataError(
            f"ImageNet is not in {directory}: there is no {' and no '.join(missing)}. Download ILSVRC2012 from"
            " https://image-net.org (it needs an account), put the images into train/CLASS/ and val/CLASS/, and name"
            " the directory that has both (`--data-dir`)."
        )
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2 as transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: one that was built for another torch
        raise DataError(
            f"ImageNet's images are decoded by torchvision, which can't be imported ({error}). Install the version that"
            " belongs to your torch: pip install torchvision."
        ) from error

    finish = [
        transforms.ToImage(),
        transforms.ToDtype(torch.float32, scale=True),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    train = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *finish]
    test = [transforms.Resize(256), transforms.CenterCrop(224), *finish]
    return StreamedData(
        ImageFolder(str(directory / "train"), transforms.Compose(train)),
        ImageFolder(str(directory / "val"), transforms.Compose(test)),
    )


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Return each image shifted by up to ``padding`` pixels, at random, and half of them mirrored left to right.

    What comes in at the edges is 0, the mean of normalized images.

    Args:
        images: of shape (samples, channels, height, width).
        padding: largest shift in each direction.
    """
    count, _, height, width = images.shape
    device = images.device
    rows = torch.randint(2 * padding + 1, (count, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * padding + 1, (count, 1), device=device) + torch.arange(width, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1))
    samples = torch.arange(count, device=device)[:, None, None]
    padded = pad(images, [padding] * 4)
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
