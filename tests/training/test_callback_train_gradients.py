"""Which gradients M follows: those of held-out samples, of the weight steps, or of both."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, held_out_loss, loader
from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback
from lightning_autoprune.method.update_rules import AdaptiveRule


def train_m(**options):
    """Return M after an epoch in which no weight moves."""

    class UntrainedNet(Net):
        def forward(self, x):
            return self.last(torch.relu(self.first(x)))  # without BatchNorm, losses are means over samples

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    reach = AdaptiveRule().reach(8)
    callback = AutoPruneCallback(auxiliary_lr=0.1 / reach, warmup=0.0, finetune=0.0, **options)  # so no mask changes
    recorded = []

    class MRecorder(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                recorded.append(torch.cat([m.flatten() for m in callback._run.pruner.auxiliary.M]))

    torch.manual_seed(0)
    fit([callback, MRecorder()], model=UntrainedNet(), epochs=1)
    return recorded[0]


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_by_default_m_follows_the_mean_gradient_over_all_samples_of_the_batch(fraction):
    both, train = train_m(held_out=fraction), train_m(held_out="train")
    torch.testing.assert_close(both, train, rtol=0, atol=1e-4)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_held_out_samples_weigh_as_much_as_others_under_gradient_accumulation(accumulated):
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, accumulate_grad_batches=accumulated)
    assert callback._held_out.source.held_out_share == 4 / (16 * accumulated)


def test_m_can_follow_the_held_out_samples_alone():
    alone = train_m(held_out=0.25, train_gradients=False)
    assert not torch.allclose(alone, train_m(held_out="train"), atol=1e-3)


def test_with_a_held_out_loader_m_follows_the_weight_steps_only_on_request():
    held_out_loader = loader(seed=3)
    both, alone = (train_m(held_out=held_out_loader, train_gradients=which) for which in (True, False))
    assert torch.equal(alone, train_m(held_out=held_out_loader))
    for single in (alone, train_m(held_out="train")):
        assert not torch.allclose(both, single, atol=1e-3)


@pytest.mark.parametrize("held_out", [0.25, "train"])
def test_the_optimizer_gets_the_gradients_of_the_training_pass_alone(held_out):
    """Masked by the masks of that pass, although M has been stepped since."""

    class GradientRecorder(Net):
        masked = 0

        def on_after_backward(self):
            self.raw = [self.first.weight.grad.clone(), self.last.weight.grad.clone()]

        def on_before_optimizer_step(self, optimizer):  # the module's hooks come after those of callbacks
            masks = callback._run.pruner.masks() or [torch.ones_like(raw, dtype=torch.bool) for raw in self.raw]
            for weight, raw, mask in zip((self.first.weight, self.last.weight), self.raw, masks, strict=True):
                assert torch.equal(weight.grad, torch.where(mask, raw, 0))
                assert torch.equal(weight, torch.where(mask, weight, 0))
                self.masked += int((~mask).sum())

    callback = AutoPruneCallback(target_sparsity=0.8, held_out=held_out, auxiliary_lr=100.0)
    model, _ = fit(callback, GradientRecorder())
    assert model.masked > 100


@pytest.mark.parametrize("train_gradients", [True, False])
def test_if_m_follows_both_gradients_they_are_taken_at_the_same_weights(train_gradients):
    same = []

    class WeightRecorder(Net):
        def training_step(self, batch):
            self.before = self.last.weight.clone()
            return super().training_step(batch)

    def loss_fn(module, batch):
        same.append(torch.equal(module.last.weight, module.before))
        return held_out_loss(module, batch)

    options = {"held_out": 0.25, "train_gradients": train_gradients, "loss_fn": loss_fn}
    fit(AutoPruneCallback(target_sparsity=0.5, **options), WeightRecorder())
    assert same[3:] == [train_gradients] * len(same[3:])  # the first calls try the loss function out
    assert len(same) > 10
