from __future__ import annotations

import gc

import torch
from helpers import Net, data, fit
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback


def tensors():
    gc.collect()
    found = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
    return sum(1 for _ in found)


def test_twenty_fits_in_one_process_leave_no_tensor_behind():
    loader = DataLoader(data(64), 16)

    def once(i):
        kinds = [{}, {"held_out": "train"}, {"held_out": loader}, {"redraw_held_out": False}]
        model = Net()
        model.example_input_array = torch.zeros(2, 12)
        fit(AutoPruneCallback(target_sparsity=0.8, **kinds[i % 4]), model, loader, epochs=3)

    for i in range(4):
        once(i)
    before = tensors()
    for i in range(20):
        once(i)
    assert tensors() <= before
