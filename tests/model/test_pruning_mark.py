from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import Net, fit
from lightning.pytorch import Callback
from torch import nn

from lightning_autoprune import AutoPruneCallback, AutoPruneError, shrink
from lightning_autoprune.model.pruning_mark import is_being_pruned, mark_as_being_pruned, remove_mark


def test_a_part_of_a_marked_model_is_marked_and_neither_a_copy_nor_a_pickle_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    keys = [set(vars(module)) for module in model.modules()]
    mark_as_being_pruned(model)
    assert is_being_pruned(model)
    assert is_being_pruned(nn.Sequential(model[0]))
    assert not is_being_pruned(copy.deepcopy(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert not is_being_pruned(torch.load(file, weights_only=False))
    remove_mark(model)
    assert not is_being_pruned(model)
    assert [set(vars(module)) for module in model.modules()] == keys


class Shrink(Callback):
    """Tries to shrink the model at every step, and remembers at which it could."""

    def __init__(self) -> None:
        self.refused, self.done, self.copied = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.copied.append(not is_being_pruned(copy.deepcopy(pl_module)))
        try:
            shrink(pl_module, torch.zeros(2, 12))
            self.done.append(trainer.global_step)
        except AutoPruneError as error:
            self.refused.append((trainer.global_step, str(error).split(":")[0]))


@pytest.mark.filterwarnings("ignore")
def test_a_model_can_not_be_shrunk_before_its_masks_are_final():
    tries = Shrink()
    model, _ = fit([AutoPruneCallback(target_sparsity=0.8), tries], model=Net())
    assert tries.refused == [(step, "Net is still being pruned") for step in range(1, 21)]
    assert tries.done == list(range(21, 33))
    assert all(tries.copied)
    assert not is_being_pruned(model)
