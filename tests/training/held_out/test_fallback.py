"""What is left of the split of batches after the default has fallen back, and of sources that were copied."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle

import pytest
from helpers import Net, data, loader, trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, sparsity


class Needy(Net):
    """Needs whole batches."""

    def training_step(self, batch):
        assert len(batch[0]) == 16
        return super().training_step(batch)


class Watch(Callback):
    """Records which loader the Trainer shows and how many processes there are, at each batch and epoch."""

    def __init__(self):
        self.loaders, self.processes = [], []

    def on_train_batch_start(self, trainer, *_):
        self.loaders.append(trainer.train_dataloader)
        self.processes.append(len(multiprocessing.active_children()))

    def on_train_epoch_end(self, trainer, *_):
        self.loaders.append(trainer.train_dataloader)


@pytest.mark.parametrize("make", [Net, Needy])
def test_the_trainer_shows_the_users_loader_in_each_phase_and_after_the_fit(make):
    train_loader, watch = loader(), Watch()
    run = trainer(epochs=8, callbacks=[watch, AutoPruneCallback(0.8)])
    run.fit(make(), train_loader)
    assert all(shown is train_loader for shown in watch.loaders)
    assert run.train_dataloader is train_loader


@pytest.mark.parametrize("make", [Net, Needy])
def test_the_workers_of_an_epoch_end_with_it(make):
    watch = Watch()
    run = trainer(epochs=4, callbacks=[watch, AutoPruneCallback(0.8)])
    gc.collect()
    gc.disable()
    try:
        run.fit(make(), DataLoader(data(), 16, num_workers=1))
    finally:
        gc.enable()
    held_out_workers = int(make is Net)
    assert max(watch.processes) == 1 + held_out_workers
    assert watch.processes[-1] == 1  # the masks are final


class FindRate(LearningRateFinder):
    """Goes back to a state that was saved before the first batch of an epoch."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch < 2:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("make", [Net, Needy])
def test_a_run_that_goes_back_to_before_its_first_batch_still_falls_back(make):
    model = make()
    model.lr = 0.01
    finder = FindRate(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    trainer(epochs=8, callbacks=[finder, AutoPruneCallback(0.8)]).fit(model, loader())
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)


HELD_OUT = {"the default": None, "fraction": 0.5, "val": "val", "train": "train", "a loader": loader(seed=1)}


@pytest.mark.parametrize("name", HELD_OUT)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_of_the_callback_prunes_too(name, copied):
    callback = copied(AutoPruneCallback(0.8, held_out=HELD_OUT[name]))
    trainer(callbacks=[callback]).fit(model := Net(), loader(), loader(seed=2))
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
    again = copied(callback)  # of a fit that is over
    trainer(callbacks=[again]).fit(model := Net(), loader(), loader(seed=2))
    assert sparsity(model) == pytest.approx(0.8, abs=0.01)
