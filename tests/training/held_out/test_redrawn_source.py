"""Holding out a share of each training batch: which batches are split, and which are refused."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, Resumable, fit, loader, same, saving
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, AutoPruneError

# Batches of lists


class Detector(Net):
    """Takes lists of images and of target dicts; notes how many images each step has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def training_step(self, batch):
        images, targets = batch
        assert all(image.shape == (3, 4) for image in images)
        labels = torch.stack([target["boxes"][0, 0] for target in targets])
        assert all((target["boxes"] == label).all() for target, label in zip(targets, labels, strict=True))
        self.sizes.append(len(images))
        return nn.functional.cross_entropy(self(torch.stack([*images]).flatten(1)), labels.long())


class Batches(Resumable):
    """Batches of eight images, as ``tuple(zip(*samples))`` makes them; unclear ones have three boxes in every image."""

    def __init__(self, unclear: range) -> None:
        super().__init__()
        self.batches = [
            (tuple(x.view(-1, 3, 4)), tuple({"boxes": label.float().expand(3, 4)} for label in labels))
            for x, labels in loader(rows=64, batch=8)
        ]
        for i, (_, targets) in enumerate(self.batches):
            if i not in unclear:  # one image has one box, so that one of the two parts is unclear by itself
                targets[0]["boxes"] = targets[0]["boxes"][:1]


def pruning(**options) -> AutoPruneCallback:
    return AutoPruneCallback(target_sparsity=0.8, warmup=0.0, finetune=0.0, **options)


def test_unclear_batches_are_split_like_the_batches_before_them():
    model = Detector()
    fit(pruning(), model=model, train=Batches(range(1, 8)), epochs=2)
    assert model.sizes == [6, 2] * 16


def test_an_unclear_first_batch_is_refused():
    with pytest.raises(AutoPruneError, match="2 lists of 8 items with tensors of 3 rows, and it is unclear whether"):
        fit(pruning(), model=Detector(), train=Batches(range(1)))


def test_an_unclear_later_batch_is_trained_on_whole_if_no_batch_was_clear():
    class Mixed(Detector):
        def training_step(self, batch):
            if isinstance(batch[0], tuple):
                return super().training_step(batch)
            self.sizes.append(len(batch[0]))
            return Net.training_step(self, batch)

    train = Batches(range(8))
    train.batches = [*loader(rows=16, batch=8), *train.batches[:2]]
    model = Mixed()
    fit(pruning(), model=model, train=train, epochs=1)
    assert model.sizes == [6, 2, 6, 2, 8, 8]


def test_a_checkpoint_stores_the_layouts_of_earlier_batches(tmp_path):
    def run(**options):
        callback = pruning()
        model, _ = fit(
            [callback, saving(str(tmp_path / "saved"), every_n_train_steps=3)],
            model=Detector(),
            train=Batches(range(1, 8)),
            epochs=1,
            enable_checkpointing=True,
            **options,
        )
        return model.sizes, dict(model.state_dict()), callback.state_dict()

    sizes, *whole = run()
    resumed_sizes, *resumed = run(ckpt_path=tmp_path / "saved" / "step=3.ckpt")
    assert (sizes, resumed_sizes) == ([6, 2] * 8, [6, 2] * 5)
    assert same(resumed, whole)


# Parts with a single sample


@pytest.mark.parametrize("batch", [2, 3])
def test_a_part_with_a_single_sample_is_refused_if_batchnorm_takes_statistics(batch):
    message = (
        rf"`held_out=0.25` of a training batch of {batch} samples leaves one side a single sample, of which the"
        " BatchNorm1d 'norm' can't take statistics: use a batch of at least four samples, `held_out=\"train\"`, or"
    )
    with pytest.raises(AutoPruneError, match=message):
        fit(AutoPruneCallback(), train=loader(rows=24, batch=batch))


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
