"""Which gradients M follows: of held-out rows, of the weight steps, or of both."""

from __future__ import annotations

import pytest
import torch
from helpers import Net, fit, loader
from lightning.pytorch import Callback

from lightning_autoprune import AutoPruneCallback


def auxiliary_parameters(**options):
    """M after an epoch in which no weight moves."""

    class Still(Net):
        def forward(self, x):
            return self.last(torch.relu(self.first(x)))  # without BatchNorm: a mean over rows, whatever the batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = AutoPruneCallback(auxiliary_lr=0.1, warmup=0.0, finetune=0.0, **options)  # no mask changes
    found = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                found.append(torch.cat([m.flatten() for m in callback._run.pruner.auxiliary.M]))

    torch.manual_seed(0)
    fit([callback, Watch()], model=Still(), epochs=1)
    return found[0]


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_by_default_m_follows_the_mean_gradient_over_all_rows_of_the_batch(fraction):
    joined, train = auxiliary_parameters(held_out=fraction), auxiliary_parameters(held_out="train")
    torch.testing.assert_close(joined, train, rtol=0, atol=1e-4)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_held_out_rows_weigh_as_all_others_where_gradients_are_accumulated(accumulated):
    callback = AutoPruneCallback(target_sparsity=0.5)
    fit(callback, accumulate_grad_batches=accumulated)
    assert callback._source.held_out_share == 4 / (16 * accumulated)


def test_m_can_follow_the_held_out_rows_alone():
    alone = auxiliary_parameters(held_out=0.25, train_gradients=False)
    assert not torch.allclose(alone, auxiliary_parameters(held_out="train"), atol=1e-3)


def test_beside_a_loader_m_follows_the_weight_steps_only_if_asked():
    other = loader(seed=3)
    joined, alone = (auxiliary_parameters(held_out=other, train_gradients=which) for which in (True, False))
    assert torch.equal(alone, auxiliary_parameters(held_out=other))
    for single in (alone, auxiliary_parameters(held_out="train")):
        assert not torch.allclose(joined, single, atol=1e-3)
