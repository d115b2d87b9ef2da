"""The demo's data and networks, and the demo itself as a user runs it."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_autoprune import prunable_weights, sparsity
from lightning_autoprune.cli import main
from lightning_autoprune.demo import data
from lightning_autoprune.demo.networks import Classifier, lenet5, lenet_300_100
from lightning_autoprune.plots import read_curves

# Data


def test_digits_are_real_and_need_no_download():
    images = data.load_digits()
    assert (len(images.train), len(images.test)) == (1000, 797)
    assert images.train.images.shape == (1000, 1, 8, 8)
    assert images.train.images.mean().abs() < 1e-5
    assert images.train.images.std() == pytest.approx(1, abs=1e-5)
    assert sorted(set(images.test.labels.tolist())) == list(range(10))


def write_idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with four small IDX files in place of MNIST's, two of them compressed, and their checksums."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (6, 28, 28)), rng.integers(0, 10, 6), rng.integers(0, 256, (4, 28, 28)), range(4)]
    checksums = {}
    for i, (name, array) in enumerate(zip(data.MNIST_FILES, arrays, strict=True)):
        content = write_idx(np.asarray(array))
        checksums[name] = hashlib.sha256(content).hexdigest()
        (tmp_path / (name if i % 2 else f"{name}.gz")).write_bytes(content if i % 2 else gzip.compress(content))
    monkeypatch.setattr(data, "MNIST_FILES", checksums)
    return tmp_path


def test_idx_files_are_read_compressed_or_not(small_mnist):
    images = data.load_mnist(small_mnist)
    assert images.train.images.shape == (6, 1, 28, 28)
    assert images.test.labels.tolist() == [0, 1, 2, 3]


def test_a_file_with_another_checksum_is_refused(small_mnist):
    (small_mnist / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x01\x05")
    with pytest.raises(
        data.DataError, match=r"is not MNIST's train-labels-idx1-ubyte: its SHA-256 differs\. Delete it"
    ):
        data.load_mnist(small_mnist)


def test_a_truncated_file_is_refused(small_mnist):
    path = small_mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(data.DataError, match="is not a complete gzip file"):
        data.load_mnist(small_mnist)


def test_a_download_is_verified_and_stored(small_mnist, monkeypatch):
    mirror, home = small_mnist / "mirror", small_mnist / "home"
    mirror.mkdir()
    for name in data.MNIST_FILES:
        plain, packed = small_mnist / name, small_mnist / f"{name}.gz"
        (mirror / packed.name).write_bytes(
            packed.read_bytes() if packed.exists() else gzip.compress(plain.read_bytes())
        )
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("file:///nowhere/", mirror.as_uri() + "/"))
    assert len(data.load_mnist(home).train) == 6
    assert len(list(home.glob("*.gz"))) == 4
    monkeypatch.setattr(data, "MNIST_MIRRORS", ())
    assert len(data.load_mnist(home).train) == 6


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("file:///nowhere/",))
    with pytest.raises(data.DataError, match=r"could not be downloaded \(file:///nowhere/train-images.*`--data-dir`\)"):
        data.load_mnist(tmp_path)


# Networks


@pytest.mark.parametrize(("network", "weights"), [(lenet_300_100(), 266_200), (lenet5(), 430_500)])
def test_the_networks_have_the_sizes_in_the_literature(network, weights):
    assert sum(weight.numel() for weight in prunable_weights(network).values()) == weights
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


# The demo


def test_the_demo_prints_layers_errors_and_compression_and_writes_its_files(tmp_path):
    arguments = ["--epochs", "4", "--target", "0.9", "--output", str(tmp_path / "out")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [sys.executable, "-m", "lightning_autoprune", "demo", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert re.search(r"network\.1 +300×64 +19,200 +[\d,]+ +\d\d\.\d\d%", out)
    assert re.search(r"all +50,200 +5,020 +90\.00%", out)
    assert "1,000 images to train on, 797 to test on" in out
    for percent, wrong in re.findall(r"(?:dense|pruned) (\d+\.\d\d)% \((\d+) wrong\)", out):
        assert float(percent) == pytest.approx(100 * int(wrong) / 797, abs=0.01)
    assert re.search(
        r"error on 797 test images +dense \d+\.\d\d% \(\d+ wrong\)   pruned \d+\.\d\d% \(\d+ wrong\)\n", out
    )
    assert "10.0× (90.00% of all weights are 0)" in out
    paths = [Path(line.split()[-1]) for line in out.splitlines() if str(tmp_path) in line]
    checkpoint, picture, run_folder, _, _ = paths
    assert picture.read_bytes()[1:4] == b"PNG"
    assert list(run_folder.glob("*.wandb"))
    plain = Classifier(lenet_300_100(64))
    plain.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert sparsity(plain) == 0.9
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"pruned.ckpt", "sparsity.png", "csv", "wandb"}
    assert "Traceback" not in result.stderr
    assert "wandb" not in result.stderr
    curves = read_curves(tmp_path / "out" / "csv" / "version_0" / "metrics.csv")
    assert curves.keys() == {"network.1", "network.3", "network.5", "all"}
    assert curves["all"][-1][1] == pytest.approx(0.9)


def test_the_demo_without_data_fails_without_a_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "MNIST_MIRRORS", ("file:///nowhere/",))
    code = main(["demo", "--data", "mnist", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")])
    assert code == 1
    assert capsys.readouterr().err.startswith("error: train-images-idx3-ubyte.gz is not in")
