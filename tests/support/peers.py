"""Tiny tasks for the benchmarks' methods, and a way to watch a run of a method."""

from __future__ import annotations

from pathlib import Path

import torch
from harness.data import Data
from harness.tasks import Task
from harness.training import train_and_test
from torch import nn

STEPS = 40  # per run: 5 epochs of 8 batches


def mlp():
    return nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 3))  # 1,020 weights


def make_task(network, shape):
    """Return a task of random inputs; the first numbers of a sample give its label, so that it can be learned."""
    inputs = torch.randn(320, *shape, generator=torch.Generator().manual_seed(0))
    labels = inputs.flatten(1)[:, :3].argmax(1)
    data = Data((inputs[:256], labels[:256]), (inputs[256:], labels[256:]))
    return Task("tiny", lambda directory: data, network, 5, 32, 1e-2, "error", (10,))


def run_watched(method, task, watch):
    """Train with another callback in the Trainer, and return the outcome and the network."""
    networks = []
    callbacks, finish = method.callbacks, method.finish
    method.callbacks = lambda: [*callbacks(), watch]
    method.finish = lambda network: networks.append(finish(network)) or networks[-1]
    outcome = train_and_test(task, method, 0, Path())
    [network] = networks
    return outcome, network
