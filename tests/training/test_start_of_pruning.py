"""When pruning begins by default, and with which M."""

from __future__ import annotations

import pytest
import torch
from helpers import BATCH, Net, fit, loader
from lightning.pytorch import Callback
from manual_models import ManualNet

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.method.fisher import saliency

EARLY, LATE, EPOCHS = 4, 10, 5  # of 40 steps


class KnownLoss(Net):
    """A model whose training loss is 1 in the first step and then a given number, with the usual gradients."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss - loss.detach() + (1.0 if self.global_step == 0 else self.loss)


class BatchSizes(Callback):
    def __init__(self):
        self.sizes = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sizes.append(len(batch[0]))


def fit_and_get_start(model, callbacks=(), train=None, **options):
    callback = AutoPruneCallback(target_sparsity=0.8, **options)
    fit([callback, *callbacks], model=model, train=train, epochs=EPOCHS)
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    return callback._run.pruner.phases.start


@pytest.mark.parametrize(("loss", "start"), [(0.9, EARLY), (0.05, LATE), (0.4, LATE), (-0.9, LATE)])
@pytest.mark.parametrize("held_out", [None, "train"])
def test_the_training_loss_decides_when_pruning_begins(held_out, loss, start):
    assert fit_and_get_start(KnownLoss(loss), held_out=held_out) == start


def test_a_warmup_of_the_users_own_takes_the_place_of_the_loss():
    assert fit_and_get_start(KnownLoss(0.9), warmup=0.5) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_split_only_from_the_planned_start_on(workers):
    recorder, samples = BatchSizes(), loader()
    train = torch.utils.data.DataLoader(samples.dataset, BATCH, num_workers=workers)
    assert fit_and_get_start(KnownLoss(0.9), [recorder], train) == EARLY
    assert recorder.sizes == [BATCH] * LATE + [12] * (26 - LATE) + [BATCH] * 14


def test_pruning_does_not_begin_early_if_m_follows_held_out_samples_alone():
    assert fit_and_get_start(KnownLoss(0.9), train_gradients=False) == LATE


def test_pruning_begins_early_if_held_out_samples_come_from_a_loader():
    assert fit_and_get_start(KnownLoss(0.9), held_out=loader(seed=3)) == EARLY


class ManualNetWithLoss(ManualNet):
    def training_step(self, batch):
        super().training_step(batch)
        return {"loss": torch.tensor(1.0)}


@pytest.mark.parametrize(("model", "start"), [(ManualNet, LATE), (ManualNetWithLoss, EARLY)])
def test_with_manual_optimization_the_loss_is_known_if_it_is_returned(model, start):
    assert fit_and_get_start(model(), held_out="train") == start


@pytest.mark.parametrize("accumulated", [1, 2])
def test_m_starts_with_the_saliencies_that_the_dense_phase_has_measured(accumulated):
    class Still(Net):
        gradients, weights = [], []

        def on_before_optimizer_step(self, optimizer):
            if callback._run.pruner.auxiliary is None:
                self.gradients.append([layer.weight.grad.clone() for layer in (self.first, self.last)])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Start(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if callback._run.pruner.auxiliary and not starts:
                starts.extend(M.clone() for M in callback._run.pruner.M.values())

    callback, model, starts = AutoPruneCallback(target_sparsity=0.8, warmup=0.25), Still(), []
    fit([callback, Start()], model=model, epochs=EPOCHS, accumulate_grad_batches=accumulated)
    F = [torch.stack(layer).square().mean(0) for layer in zip(*model.gradients, strict=True)]
    mean_F = float(torch.cat([f.flatten() for f in F]).mean())
    dense = callback._run.pruner.weights.values()
    S = [saliency(w.detach(), f, mean_F) for w, f in zip(dense, F, strict=True)]
    root_mean_square = torch.cat([s.flatten() for s in S]).square().mean().sqrt()
    assert len(model.gradients) == LATE // accumulated
    for M, s, weight in zip(starts, S, dense, strict=True):
        kept = weight != 0  # pruned weights are 0 when training has ended
        unscaled = 0.1 * s / root_mean_square
        ratio = (M / unscaled)[kept]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_a_run_far_too_short_for_its_target_is_warned_of(recwarn):
    fit(AutoPruneCallback(target_sparsity=0.9), epochs=2)
    found = [str(warning.message) for warning in recwarn if "steps or more are advised" in str(warning.message)]
    assert found == [
        "`target_sparsity` is 0.9, and the run has 16 steps. Pruning so much so fast costs accuracy: 200 steps or more"
        " are advised. Train longer, or ask for less."
    ]


@pytest.mark.parametrize("options", [{"target_sparsity": 0.5}, {}, {"target_sparsity": 0.9, "enabled": False}])
def test_no_run_that_is_long_enough_is_warned_of(recwarn, options):
    fit(AutoPruneCallback(**options), epochs=2)
    assert not [warning for warning in recwarn if "advised" in str(warning.message)]
