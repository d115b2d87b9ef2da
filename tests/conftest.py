"""Keeps tests away from the user's folders and the network, and runs them on one thread, as they are small."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile

_SCRATCH = tempfile.mkdtemp(prefix="lightning-autoprune-tests-")
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"
for _name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
    os.environ[_name] = os.path.join(_SCRATCH, _name.lower())
    os.makedirs(os.environ[_name])

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _run_in_scratch_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def path(tmp_path):
    """Return the path of a sparse file that does not exist yet."""
    return tmp_path / "model.safetensors"
