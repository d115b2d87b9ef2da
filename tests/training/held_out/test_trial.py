"""The trial of the split on the first batch: what it refuses, and that it leaves no trace in the run."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from helpers import CLASSES, FEATURES, Net, fit, loader, same
from lightning.pytorch import Callback
from named_samples import NamedSamples
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_autoprune import AutoPruneCallback, AutoPruneError

# Losses that need whole batches


class Queue(Net):
    """Keeps the last 64 outputs, as MoCo does; a batch must divide them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(0)))
        self.at = 0

    def training_step(self, batch):
        z = self(batch[0])
        assert 64 % len(z) == 0, f"a queue of 64, and a batch of {len(z)}"
        loss = cross_entropy(z @ self.queue.T.clone(), torch.zeros(len(z), dtype=torch.long))
        self.queue[self.at : self.at + len(z)] = z.detach()
        self.at = (self.at + len(z)) % 64
        return loss


class Recurrent(Net):
    """Keeps its state from one batch to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(FEATURES, FEATURES)
        self.state: torch.Tensor | None = None

    def training_step(self, batch):
        self.state = self.cell(batch[0], None if self.state is None else self.state.detach())
        return cross_entropy(self(self.state), batch[1])


class FixedBatch(Net):
    def training_step(self, batch):
        x, y = batch
        return cross_entropy(self(x.view(16, FEATURES)), y)


class WholeBatches(Callback):
    """Checks that training starts with whole batches."""

    sizes: set[int] = set()  # noqa: RUF012

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.add(len(batch[0]))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Queue,
            "`training_step` of Queue raises on the rest of a batch: AssertionError: a queue of 64, and a batch of",
        ),
        (Recurrent, "`training_step` of Recurrent raises on the rest of a batch: RuntimeError"),
        (FixedBatch, "`training_step` of FixedBatch raises on the rest of a batch: RuntimeError: shape '"),
    ],
)
@pytest.mark.parametrize("ready", [False, True], ids=["loader", "ready batches"])
def test_a_network_that_needs_whole_batches_falls_back_with_the_bits_of_train(kind, message, ready):
    def run(held_out):
        callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out, warmup=0.1)
        torch.manual_seed(0)
        train = DataLoader(list(loader()), batch_size=None) if ready else loader(shuffle=True)
        model, t = fit([callback, WholeBatches()], model=kind(), train=train)
        state = {**callback.state_dict(), "settings": None}
        return dict(model.state_dict()), state, t.optimizers[0].state_dict(), torch.get_rng_state()

    with pytest.warns(UserWarning, match=message) as caught:
        found = run(None)
    assert len([w for w in caught if "nothing can be held out" in str(w.message)]) == 1
    assert WholeBatches.sizes == {16}
    assert same(found, run("train"))
    with pytest.raises(AutoPruneError, match=f"^No data can be held out: {message}") as error:
        run(0.25)
    assert error.value.__cause__ is not None
    assert 'Pass `held_out="train"`' in str(error.value)


def test_two_views_of_each_sample_that_are_collated_one_after_the_other_stay_together():
    matches = []

    class Views(Net):
        def training_step(self, batch):
            x, numbers = batch
            one, two = numbers.chunk(2)
            matches.append((len(one), torch.equal(one, two)))
            z = normalize(self(x), dim=1)
            similarity = (z @ z.T / 0.5).fill_diagonal_(-1e9)
            order = torch.arange(len(one))
            return cross_entropy(similarity, torch.cat([order + len(one), order]))

    def views(samples):
        numbers, x, _ = zip(*samples, strict=True)
        return torch.cat([torch.stack(x), torch.stack(x) + 0.1]), torch.tensor(numbers + numbers)

    train = DataLoader(NamedSamples(), 16, shuffle=True, collate_fn=views)
    callback = AutoPruneCallback(target_sparsity=0.8, held_out=0.25)
    fit(callback, model=Views(), train=train)
    assert {match for _, match in matches} == {True}
    assert {size for size, _ in matches} == {16, 12, 4}
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_loss_function_that_fails_on_a_part_falls_back_and_is_named():
    def loss(module, batch):
        raise KeyError("mask")

    with pytest.raises(AutoPruneError, match="`loss_fn` raises on the held-out part of a batch: KeyError: 'mask'"):
        fit(AutoPruneCallback(held_out=0.25, loss_fn=loss))
    with pytest.warns(UserWarning, match="`loss_fn` raises on the held-out part of a batch: KeyError: 'mask'"):
        fit(AutoPruneCallback(loss_fn=loss))


# No trace


class Stateful(Net):
    """Changes all that a training step can change, and has a teacher."""

    def __init__(self) -> None:
        super().__init__(noisy=True)
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.mean = MeanMetric()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("center", torch.zeros(CLASSES))
        self.calls, self.losses, self.seen, self.by_size = 0, [], deque(maxlen=99), {}
        self.last = nn.Linear(16, CLASSES)

    def training_step(self, batch):
        loss = super().training_step(batch) + random.random() + float(np.random.rand())
        with torch.no_grad():
            self.teacher.weight.lerp_(torch.randn(CLASSES, FEATURES), 0.1)
            self.steps += 1
            self.center = self.center * 0.9 + self(batch[0]).mean(0)
        self.calls += 1
        self.losses.append(float(loss))
        self.seen.append(len(batch[0]))
        self.by_size[len(batch[0])] = self.calls
        self.mean.update(loss.detach())
        self.latest = loss.detach()
        return loss


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("falls_back", [False, True])
def test_the_trial_changes_nothing_of_the_run(workers, falls_back):
    """The run ends before pruning begins, so that only the trial can change it."""

    class Failing(Stateful):
        def training_step(self, batch):
            loss = super().training_step(batch)
            assert len(batch[0]) > 4, "too few"
            return loss

    class Stops(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    def run(*callbacks):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        train = loader(shuffle=True)
        train = DataLoader(train.dataset, 16, shuffle=True, num_workers=workers)
        model, t = fit([*callbacks, Stops()], model=(Failing if falls_back else Stateful)(), train=train)
        attributes = (model.calls, model.losses, list(model.seen), model.by_size, model.mean.compute(), model.latest)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert model.calls == 8
        metrics = {name: value for name, value in t.callback_metrics.items() if not name.startswith("autoprune")}
        return dict(model.state_dict()), attributes, states, metrics, t.optimizers[0].state_dict()

    assert same(run(AutoPruneCallback(warmup=0.5)), run())


def test_a_trial_is_made_once_per_run_and_not_when_it_resumes(tmp_path):
    calls = []

    class Noting(Net):
        def training_step(self, batch):
            calls.append(len(batch[0]))
            return super().training_step(batch)

    def run(**options):
        calls.clear()
        _, t = fit(AutoPruneCallback(warmup=0.5), model=Noting(), epochs=2, **options)
        return t

    t = run()
    assert calls[:4] == [16, 12, 4, 16]
    t.save_checkpoint("all.ckpt")
    run(ckpt_path="all.ckpt", max_steps=-1)
    assert calls == []
