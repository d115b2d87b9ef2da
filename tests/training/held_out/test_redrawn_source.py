"""Holding out a share of each training batch: of a loader's samples, or of the rows of ready batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import Net, Resumable, data, fit, loader, same, saving
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_autoprune import AutoPruneCallback, AutoPruneError

# Batches of lists


class Detector(Net):
    """Takes lists of images and of target dicts; notes how many images each step has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def training_step(self, batch):
        if isinstance(batch[0], torch.Tensor):
            self.sizes.append(len(batch[0]))
            return super().training_step(batch)
        images, targets = batch
        assert all(image.shape == (3, 4) for image in images)
        labels = torch.stack([target["boxes"][0, 0] for target in targets])
        assert all((target["boxes"] == label).all() for target, label in zip(targets, labels, strict=True))
        self.sizes.append(len(images))
        return nn.functional.cross_entropy(self(torch.stack([*images]).flatten(1)), labels.long())


class Images(Dataset):
    """Images with one to three boxes each."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        x, label = data()[i]
        return x.view(3, 4), {"boxes": label.float().expand(1 + i % 3, 4)}


def collate(samples):
    return tuple(zip(*samples, strict=True))


class ReadyBatches(Resumable):
    """Batches of eight images that nobody collates, after some plain ones."""

    def __init__(self, plain: int = 0) -> None:
        super().__init__()
        self.batches = list(loader(rows=8 * plain, batch=8)) if plain else []
        self.batches += DataLoader(Images(), 8, collate_fn=collate)


def pruning(**options) -> AutoPruneCallback:
    return AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0, **options)


def test_lists_of_images_are_held_out_by_image():
    model = Detector()
    fit(pruning(held_out=0.25), model=model, train=DataLoader(Images(), 8, collate_fn=collate), epochs=2)
    assert model.sizes == [6, 2] * 16


def test_ready_batches_that_are_not_plain_fall_back():
    with pytest.raises(AutoPruneError, match=r"a batch has .*, and each may be a sample"):
        fit(pruning(held_out=0.25), model=Detector(), train=ReadyBatches())
    model, expected = Detector(), Detector()
    expected.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="nothing can be held out, so M is trained on the training batches"):
        fit(pruning(), model=model, train=ReadyBatches())
    fit(pruning(held_out="train"), model=expected, train=ReadyBatches())
    assert model.sizes == expected.sizes == [8] * 32
    assert same(dict(model.state_dict()), dict(expected.state_dict()))


def test_a_later_batch_that_is_not_plain_is_trained_on_whole():
    model = Detector()
    fit(pruning(held_out=0.25), model=model, train=ReadyBatches(plain=2), epochs=1)
    assert model.sizes == [6, 2, 6, 2, *[8] * 8]


# Streams


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_plain_tensors_is_split_like_a_list_of_its_batches(workers):
    def run(train):
        callback = pruning(held_out=0.25)
        torch.manual_seed(0)
        model, _ = fit(callback, model=Detector(), train=train, epochs=-1, max_steps=24)
        return model.sizes, dict(model.state_dict()), callback.state_dict()

    sizes, *state = run(DataLoader(Stream(), 16, num_workers=workers))
    assert sizes == [12, 4] * 24
    plain_sizes, *plain = run(DataLoader(list(loader()), batch_size=None))
    assert (plain_sizes, same(plain, state)) == (sizes, True)


def test_a_loader_of_ready_batches_resumes_in_the_middle_of_an_epoch(tmp_path):
    def run(**options):
        callback = pruning()
        torch.manual_seed(0)
        model, _ = fit(
            [callback, saving(str(tmp_path / "saved"), every_n_train_steps=3)],
            model=Detector(),
            train=Resumable(),
            epochs=1,
            enable_checkpointing=True,
            **options,
        )
        return model.sizes, dict(model.state_dict()), callback.state_dict()

    sizes, *whole = run()
    resumed_sizes, *resumed = run(ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert (sizes, resumed_sizes) == ([12, 4] * 8, [12, 4] * 5)
    assert same(resumed, whole)


# Parts with a single sample


@pytest.mark.parametrize("batch", [2, 3])
def test_a_part_with_a_single_sample_falls_back_if_batchnorm_takes_statistics(batch):
    message = r"raises on (the rest of a|the held-out part of a) batch: ValueError: Expected more than 1 value per chan"
    with pytest.raises(AutoPruneError, match=message):
        fit(AutoPruneCallback(held_out=0.25), train=loader(rows=24, batch=batch))
    callback = AutoPruneCallback(target_sparsity=0.8)
    with pytest.warns(UserWarning, match=message):
        fit(callback, train=loader(rows=24, batch=batch))
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_part_with_a_single_sample_is_accepted_if_batchnorm_takes_no_statistics():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    callback = AutoPruneCallback(target_sparsity=0.8)
    model = Frozen()
    model.train()
    fit(callback, model=model, train=loader(rows=24, batch=2))
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


# The user's own batches

HOOKS = ("on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad", "on_train_batch_end")
HOOKS += ("on_train_epoch_end", "on_validation_epoch_end")


@pytest.mark.parametrize("train", [loader(), DataLoader([None, *loader(), None], batch_size=None)], ids=["", "none"])
def test_batches_that_the_user_moves_are_not_split_and_change_nothing(train):
    class Moves(Callback):
        def __init__(self):
            self.sizes = {}
            for hook in HOOKS:
                setattr(self, hook, lambda trainer, module, *_, name=hook: self.move(trainer, name))

        def move(self, trainer, name):
            batch = trainer.strategy.batch_to_device([torch.zeros(40, 12)])
            self.sizes.setdefault(name, set()).add(len(batch[0]))

    class Moving(Net):
        def training_step(self, batch):
            assert len(self.trainer.strategy.batch_to_device(torch.zeros(40))) == 40
            return super().training_step(batch)

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 2 and batch_idx == 4 else None

    def run(kind, *callbacks):
        callback = pruning()
        torch.manual_seed(0)
        model, t = fit([callback, *callbacks], model=kind(), train=train, val=loader(seed=3))
        return dict(model.state_dict()), callback.state_dict(), t.global_step

    class Plain(Moving):
        training_step = Net.training_step

    moves = Moves()
    assert same(run(Moving, moves), run(Plain))
    assert moves.sizes == {hook: {40} for hook in HOOKS}


@pytest.mark.parametrize("enabled", [True, False])
def test_a_dataset_with_random_numbers_of_its_own_gives_the_same_samples_in_the_dense_phase(enabled):
    class Noisy(Dataset):
        def __init__(self):
            self.random = np.random.default_rng(0)

        def __len__(self):
            return 64

        def __getitem__(self, index):
            x, y = data(64)[index]
            return x + float(self.random.random()), y

    class Watch(Callback):
        def __init__(self):
            self.batches = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.batches.append(batch[0].clone())

    def batches(*callbacks):
        watch = Watch()
        fit([*callbacks, watch], train=DataLoader(Noisy(), 16), epochs=4)
        return watch.batches[:4]

    assert same(batches(AutoPruneCallback(target_sparsity=0.8, enabled=enabled)), batches())
