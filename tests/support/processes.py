"""Starts real processes for the tests on several ranks (gloo, on the CPU)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from paths import ROOT, SUPPORT

CLUSTER = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK")  # set if this process is a rank


def start(script: str, arguments: list[str], **environment: str) -> subprocess.Popen:
    """Start a script of the support folder in a new process, without the variables of a group of this one."""
    inherited = {name: value for name, value in os.environ.items() if name not in CLUSTER}
    env = {**inherited, "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(SUPPORT / script), *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for processes, and fail with their output unless all of them succeed."""
    try:
        output = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(output)[-6000:]


def run_on_two_ranks(script: str, folder: Path) -> None:
    """Run a script on two ranks, each in its own process; it gets the folder to write to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    finish([start(script, [str(folder)], **shared, LOCAL_RANK=str(rank)) for rank in range(2)])


def results(folder: Path) -> list[Any]:
    """Return what each rank of :func:`run_on_two_ranks` saved."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
