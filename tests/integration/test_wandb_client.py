"""The real W&B client, online, with a stub server on the loopback: what the server receives, and its failures."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Net, same
from wandb_stub import WandbStub

from lightning_autoprune import sparsity

FIT = """
import torch
from helpers import fit
from lightning.pytorch.loggers import WandbLogger
from lightning_autoprune import AutoPruneCallback

torch.set_num_threads(1)
callback = AutoPruneCallback(target_sparsity=0.75, log_artifact=True)
model, _ = fit(callback, logger=WandbLogger(project="test", save_dir="."))
torch.save(model.state_dict(), "fitted.pt")
"""
WARNING = "The pruned checkpoint was not logged to W&B"
GIVE_UP_SOON = {  # one retry after a second; 0 or a fraction would mean the default, which retries for minutes
    f"WANDB__{part}_RETRY_{name}": "1"
    for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")
    for name in ("MAX", "WAIT_MIN_SECONDS", "WAIT_MAX_SECONDS")
}


def fit_online(folder: Path, url: str) -> tuple[dict[str, torch.Tensor], str]:
    """Fit in a new process, since the client can't change its mode; return the model's state and the messages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        environment[name] = str(folder / name.lower())
        (folder / name.lower()).mkdir()
    environment |= {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",  # error reports would go to W&B's own server
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **GIVE_UP_SOON,
    }
    command = [sys.executable, "-c", FIT]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "fitted.pt", weights_only=True), done.stderr


def sparsity_of(state: dict[str, torch.Tensor]) -> float:
    model = Net()
    model.load_state_dict(state)
    return sparsity(model)


def test_the_server_receives_the_pruned_checkpoint_and_its_metadata(tmp_path):
    with WandbStub() as stub:
        fitted, messages = fit_online(tmp_path, stub.url)
    assert WARNING not in messages
    created = [variables["input"] for variables in stub.asked("CreateArtifact")]
    [artifact] = [given for given in created if given["artifactTypeName"] == "model"]
    assert "pruned" in {alias["alias"] for alias in artifact["aliases"]}
    assert json.loads(artifact["metadata"])["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert json.loads(stub.uploads["model/manifest.json"])["contents"].keys() == {"model.ckpt"}
    assert stub.asked("CommitArtifact").count({"artifactID": "model"}) == 1
    checkpoint = torch.load(io.BytesIO(stub.uploads["model/model.ckpt"]), weights_only=True)
    assert same(dict(checkpoint["state_dict"]), dict(fitted))
    assert sparsity_of(checkpoint["state_dict"]) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(
    "trouble",
    [{"failing": "CreateArtifact"}, {"last": "CreateArtifact"}],
    ids=["artifacts fail", "the server is gone"],
)
def test_training_ends_well_if_the_server_fails(tmp_path, trouble):
    with WandbStub(**trouble) as stub:
        fitted, messages = fit_online(tmp_path, stub.url)
    assert stub.asked("CreateArtifact")
    assert not stub.asked("CommitArtifact")
    assert WARNING in messages
    assert sparsity_of(fitted) == pytest.approx(0.75, abs=0.01)
