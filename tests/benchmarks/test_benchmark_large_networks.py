"""The paper's larger networks have their published sizes, read their data, and train with the callback."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from harness import image_data
from harness.data import StreamedData
from harness.image_data import cifar10, crop_and_flip, imagenet
from harness.methods import METHODS
from harness.networks import InvertedResidual, mobilenet_v2, vgg_like
from harness.tasks import DEFAULT_TASKS, LARGE_TASKS, TASKS
from harness.training import Hardware, train_and_test, train_network
from paths import ROOT
from torch import nn
from torch.utils.data import TensorDataset

from lightning_autoprune import model_cost, prunable_weights, shrink
from lightning_autoprune.demo.data import DataError

IMAGES = 16  # in each of the six files, in place of 10,000
BF16 = Hardware("cpu", "bf16-mixed")


def parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def records():
    """Return the bytes of each small CIFAR-10 file: 16 records of a label and the channels of an image."""
    rng = np.random.default_rng(0)
    found = {}
    for name in image_data.CIFAR10_TRAIN + image_data.CIFAR10_TEST:
        labels, pixels = rng.integers(0, 10, (IMAGES, 1)), rng.integers(0, 256, (IMAGES, 3072))
        found[name] = np.concatenate([labels, pixels], 1).astype(np.uint8)
    return found


@pytest.fixture
def archive(records, tmp_path, monkeypatch):
    """Write an archive of small files in place of CIFAR-10's, whose checksum is expected from now on."""
    path = tmp_path / "cifar10" / image_data.CIFAR10_ARCHIVE
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as file:
        for name, content in records.items():
            entry = tarfile.TarInfo(name)
            entry.size = content.nbytes
            file.addfile(entry, io.BytesIO(content.tobytes()))
    monkeypatch.setattr(image_data, "CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(image_data, "CIFAR10_URL", "file:///nowhere/cifar-10-binary.tar.gz")
    return path


# Networks


def test_the_vgg_like_network_has_15_million_parameters_in_13_convolutions_and_2_linear_layers():
    network = vgg_like()
    assert [w.dim() for w in prunable_weights(network).values()] == [4] * 13 + [2] * 2
    assert sum(w.numel() for w in prunable_weights(network).values()) == 14_977_728
    assert parameters(network) == 14_987_210
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_mobilenet_v2_has_its_published_parameters_and_operations():
    network = mobilenet_v2().eval()
    assert parameters(network) == 3_504_872
    images = torch.randn(1, 3, 224, 224)
    assert network(images).shape == (1, 1000)
    assert model_cost(network, images).flops / 2 == pytest.approx(300e6, rel=0.01)  # multiply-adds


def test_large_tasks_run_only_if_they_are_named():
    assert not {task.name for task in LARGE_TASKS} & set(DEFAULT_TASKS)
    assert {task.name for task in LARGE_TASKS} | set(DEFAULT_TASKS) == TASKS.keys()


# Data


def test_cifar_images_and_labels_are_in_the_order_of_the_files_and_normalized_per_channel(archive, records):
    data = cifar10(archive.parent)
    assert data.train[0].shape == (5 * IMAGES, 3, 32, 32)
    assert data.test[0].shape == (IMAGES, 3, 32, 32)
    train = np.concatenate([records[name] for name in image_data.CIFAR10_TRAIN])
    test = records["cifar-10-batches-bin/test_batch.bin"]
    assert data.train[1].tolist() == train[:, 0].tolist()
    assert data.test[1].tolist() == test[:, 0].tolist()
    pixels = train[:, 1:].reshape(-1, 3, 32, 32).astype(np.float64)
    expected = (test[:, 1:].reshape(-1, 3, 32, 32) - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std(
        (0, 2, 3), keepdims=True
    )
    np.testing.assert_allclose(data.test[0].numpy(), expected, atol=1e-3)


def test_another_archive_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is not CIFAR-10's binary version.*Delete it"):
        cifar10(archive.parent)


def test_a_missing_archive_is_downloaded_verified_and_stored(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "CIFAR10_URL", archive.as_uri())
    home = tmp_path / "new" / "home"
    assert torch.equal(cifar10(home).train[0], cifar10(archive.parent).train[0])
    assert [path.name for path in home.iterdir()] == [image_data.CIFAR10_ARCHIVE]
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(b"an error page")
    monkeypatch.setattr(image_data, "CIFAR10_URL", bad.as_uri())
    with pytest.raises(DataError, match=r"the download is not CIFAR-10's binary version"):
        cifar10(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failed_download_says_what_to_download_and_where_to_put_it(archive, tmp_path):
    with pytest.raises(DataError, match=rf"is not in {tmp_path} .*binary version.*not unpacked.*`--data-dir`"):
        cifar10(tmp_path)


def test_a_missing_imagenet_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"there is no \S+/val\. .*val/CLASS/"):
        imagenet(tmp_path)


def test_without_torchvision_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="pip install torchvision"):
        imagenet(tmp_path)


def test_imagenet_folders_give_normalized_images_of_224_pixels(tmp_path):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("torchvision can't be imported")
    from PIL import Image

    for i, name in enumerate(("train/a/0", "train/b/0", "train/b/1", "val/a/0", "val/b/0")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((240, 300, 3), 40 * i, np.uint8)).save(path)
    data = imagenet(tmp_path)
    assert data.train_samples == 3
    [(images, labels)] = data.test_batches()
    assert labels.tolist() == [0, 1]
    expected = (120 / 255 - torch.tensor(image_data.IMAGENET_MEAN)) / torch.tensor(image_data.IMAGENET_STD)
    torch.testing.assert_close(images[0], expected[:, None, None].expand(3, 224, 224), atol=1e-4, rtol=0)
    assert data.first_inputs(2).shape == (2, 3, 224, 224)


def test_streamed_samples_are_loaded_by_workers_in_the_order_of_the_seed():
    samples = TensorDataset(torch.arange(10.0), torch.arange(10))
    data = StreamedData(samples, samples)

    def order(seed: int, workers: int = 0) -> list[int]:
        return torch.cat([labels for _, labels in data.train_loader(3, seed, workers)]).tolist()

    assert order(1) == order(1, workers=1) != order(2)
    assert sorted(order(2)) == list(range(10))
    assert data.first_inputs(3).tolist() == [0, 1, 2]


def test_a_crop_is_a_shift_with_zeros_at_the_edges_and_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    image = torch.arange(1.0, 61).view(1, 2, 5, 6)
    count = 400
    results = crop_and_flip(image.expand(count, -1, -1, -1), padding=1)
    assert results.shape == (count, 2, 5, 6)
    padded = torch.nn.functional.pad(image[0], [1] * 4)
    shifts = [padded[:, y : y + 5, x : x + 6] for y in range(3) for x in range(3)]
    expected = {tuple(shift.flatten().tolist()): False for shift in shifts}
    expected |= {tuple(shift.flip(2).flatten().tolist()): True for shift in shifts}
    found = [tuple(result.flatten().tolist()) for result in results]
    assert set(found) == expected.keys()  # all of the 18, and nothing else
    assert 0.4 < sum(expected[result] for result in found) / count < 0.6


# Training


def test_the_vgg_like_task_trains_augmented_in_mixed_precision_and_meets_its_target(archive):
    seen = []

    def augment(images):
        seen.append(images.shape)
        return crop_and_flip(images)

    task = dataclasses.replace(TASKS["vgg-like"], epochs=2, batch=40, augment=augment)
    outcome = train_and_test(task, METHODS["autoprune"](75, 0), 0, archive.parent, hardware=BF16)
    assert outcome.compression == 75.0
    assert outcome.passes == 1.0
    assert sum(shape[0] for shape in seen) >= 2 * 5 * IMAGES  # the trial of the split passes some too
    assert np.isfinite(outcome.loss)


def test_the_optimizer_of_a_task_is_used():
    optimizers = []

    def keep(groups, lr):
        optimizers.append(TASKS["mobilenet-v2"].optimizer(groups, lr))
        return optimizers[-1]

    task = dataclasses.replace(TASKS["tabular"], optimizer=keep, lr=0.05)
    train_and_test(task, METHODS["dense"](None, 0), 0, ROOT, epochs=1)
    [optimizer] = optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 4e-5)


@pytest.fixture
def streamed():
    """Return a few random color images that are loaded one by one."""
    samples = TensorDataset(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16))
    return StreamedData(samples, samples)


def test_the_mobilenet_task_trains_on_streamed_images_and_meets_its_target(streamed):
    task = dataclasses.replace(TASKS["mobilenet-v2"], epochs=3, batch=8, data=lambda directory: streamed)
    outcome = train_and_test(task, METHODS["autoprune"](4, 0), 0, ROOT, hardware=BF16)
    assert outcome.compression == 4.0
    assert outcome.passes == 1.0


def test_inverted_residuals_lose_channels_until_the_operations_are_met(streamed):
    def network():
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16)]
        return nn.Sequential(nn.Conv2d(3, 8, 3, 2), InvertedResidual(8, 8, 1, 6), InvertedResidual(8, 16, 2, 6), *head)

    task = dataclasses.replace(
        TASKS["mobilenet-v2"], epochs=10, batch=8, data=lambda directory: streamed, network=network
    )
    method = METHODS["autoprune"](None, 0, granularity="neuron", target_flops=0.5)
    small = shrink(train_network(task, method, 0, ROOT).network, streamed.first_inputs(1))
    share = model_cost(small, streamed.first_inputs(1)).flops / model_cost(network(), streamed.first_inputs(1)).flops
    assert 0.4 < share <= 0.5


def test_the_command_names_the_missing_data(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--tasks", "mobilenet-v2", "--seeds", "0"]
    command += ["--methods", "dense", "--data-dir", "imagenet", "--results", "a.csv", "--accelerator", "auto"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "DataError: ImageNet is not in imagenet: there is no imagenet/train and no imagenet/val." in process.stderr
