"""Repeated fits in one process keep no tensors alive."""

from __future__ import annotations

import gc

import torch
from helpers import Net, data, fit
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback


def count_tensors():
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def test_twenty_fits_in_one_process_leave_no_tensor_behind():
    loader = DataLoader(data(64), 16)

    def fit_once(i):
        held_out_options = [{}, {"held_out": "train"}, {"held_out": loader}, {"redraw_held_out": False}]
        model = Net()
        model.example_input_array = torch.zeros(2, 12)
        fit(AutoPruneCallback(target_sparsity=0.8, **held_out_options[i % 4]), model, loader, epochs=3)

    for i in range(4):
        fit_once(i)
    before = count_tensors()
    for i in range(20):
        fit_once(i)
    assert count_tensors() <= before
