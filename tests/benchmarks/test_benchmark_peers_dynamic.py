"""The benchmarks' RigL, SET, Hyperflux and ModelPruning do what their papers or their documentation say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from harness.methods.dynamic import DynamicSparse, erk_counts
from harness.methods.hyperflux import Hyperflux
from harness.methods.lightning_pruning import LightningPruning
from harness.tasks import Task
from harness.training import train_and_test
from lightning.pytorch import Callback
from peers import STEPS, make_task, mlp, run_watched
from torch import nn

from lightning_autoprune.model.prunable_layers import prunable_weights


def convolutions():
    layers = nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 3))  # 510 weights


MLP, CONVOLUTIONS = make_task(mlp, (12,)), make_task(convolutions, (1, 8, 8))


class Watch(Callback):
    """Records the gradients of each step, the weights after it, and the result of ``look``."""

    def __init__(self, look=lambda: None):
        self.look, self.gradients, self.weights, self.looks = look, [], [], []

    def on_train_start(self, trainer, pl_module):
        self.parameters = list(prunable_weights(pl_module).values())

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append([w.grad.clone() for w in self.parameters])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append([w.detach().clone() for w in self.parameters])
        self.looks.append(self.look())


def run(method, task=MLP, look=lambda: None):
    """Train, and return the outcome, the watch and the network."""
    watch = Watch(look)
    outcome, network = run_watched(method, task, watch)
    return outcome, watch, network


def nonzero(weights):
    return sum(int(w.count_nonzero()) for w in weights)


METHODS = {
    "rigl": lambda compression: DynamicSparse(compression, "gradient", every=3),
    "set": lambda compression: DynamicSparse(compression, "random", every=3),
    "hyperflux": Hyperflux,
    "lightning": LightningPruning,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("task", "total"), [(MLP, 1020), (CONVOLUTIONS, 510)], ids=["mlp", "convolutions"])
def test_compression_is_exact_and_weights_are_plain(name, task, total):
    outcome, _, network = run(METHODS[name](7), task)
    weights = prunable_weights(network)
    assert sum(w.numel() for w in weights.values()) == total
    assert nonzero(weights.values()) == round(total / 7)
    assert outcome.compression == round(total / round(total / 7), 1)
    assert set(network.state_dict()) == set(task.network().state_dict())  # no weight_orig, no masks
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert math.isfinite(outcome.loss)


@pytest.mark.parametrize(("name", "end"), [("rigl", 0.75), ("set", 0.75), ("hyperflux", 0.66)])
def test_fine_tuning_keeps_the_masks_and_trains_the_kept_weights(name, end):
    _, watch, _ = run(METHODS[name](7))
    start = math.ceil(end * STEPS)
    masks = [w != 0 for w in watch.weights[start]]
    for weights in watch.weights[start:]:
        assert all(torch.equal(w != 0, mask) for w, mask in zip(weights, masks, strict=True))
    changed = [a != b for a, b in zip(watch.weights[start], watch.weights[-1], strict=True)]
    assert sum(int(change.sum()) for change in changed) > 0.9 * round(1020 / 7)


# ERK


def test_erk_densities_are_proportional_to_the_sum_of_the_dimensions_over_their_product():
    shapes = [(1000, 600), (200, 100), (64, 32, 3, 3)]
    counts = erk_counts(shapes, 2002)  # the sums are 1600, 300 and 102: a scale of exactly 1
    assert counts == [1600, 300, 102]


def test_erk_layers_that_are_too_small_stay_dense_and_the_others_share_the_rest():
    # (10, 1) would get 1001 · 11/621 = 17.7; of the other 991, 500/610 is 812.3 and 110/610 is 178.7
    assert erk_counts([(300, 200), (100, 10), (10, 1)], 1001) == [812, 179, 10]


@pytest.mark.parametrize("keep", [0, 1, 3, 10, 57, 333, 1019, 1020])
def test_erk_counts_sum_to_the_number_to_keep_and_fit(keep):
    shapes = [w.shape for w in prunable_weights(mlp()).values()]
    counts = erk_counts(shapes, keep)
    assert sum(counts) == keep
    assert all(0 <= count <= math.prod(shape) for count, shape in zip(counts, shapes, strict=True))


def test_erk_refuses_more_weights_than_there_are():
    with pytest.raises(ValueError, match="`keep` is 11; it must be from 0 to 10"):
        erk_counts([(5, 2)], 11)


# RigL and SET


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_first_masks_do_not_depend_on_the_weights_of_the_same_seed(grow):
    class First(Callback):
        def on_train_start(self, trainer, pl_module):
            first = next(iter(prunable_weights(pl_module).values())).detach()
            self.positive = float((first[first != 0] > 0).float().mean())

    watch = First()
    run_watched(DynamicSparse(3, grow, seed=0), MLP, watch)  # the seed of `run_watched`
    assert 0.3 < watch.positive < 0.7


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_every_layer_has_its_number_of_weights_from_the_first_step_on(grow):
    method = DynamicSparse(7, grow, every=3)
    _, watch, _ = run(method, look=lambda: [mask.clone() for mask in method.masks])
    counts = erk_counts([w.shape for w in method.weights], round(1020 / 7))
    assert len(watch.looks) == STEPS
    for masks, weights in zip(watch.looks, watch.weights, strict=True):
        assert [int(mask.sum()) for mask in masks] == counts
        assert all((w[~mask] == 0).all() for w, mask in zip(weights, masks, strict=True))
    moves = [
        step
        for step in range(1, STEPS)
        if any(not torch.equal(a, b) for a, b in zip(watch.looks[step - 1], watch.looks[step], strict=True))
    ]
    assert moves
    assert all((step + 1) % 3 == 0 and step + 1 < 0.75 * STEPS for step in moves)


def test_the_exchanged_fraction_falls_on_a_cosine():
    method = DynamicSparse(2, "random", fraction=0.4, end=1.0)
    method.steps = 40
    for method.step in (0, 10, 20, 40):
        assert method.exchange_fraction == pytest.approx(0.2 * (1 + math.cos(math.pi * method.step / 40)))

    class DroppedGrowLast(DynamicSparse):
        """Grows dropped weights only after all others."""

        def _random_scores(self, weight):
            active = weight != 0
            return super()._random_scores(weight).masked_fill(active, -0.5)

    for _, _, old, new, count in exchanges("random", DroppedGrowLast):
        assert int((old & ~new).sum()) == count


def test_rigl_grows_by_the_largest_gradient_and_from_zero():
    method = DynamicSparse(7, "gradient", fraction=0.5, every=10)
    _, watch, _ = run(method, look=lambda: [mask.clone() for mask in method.masks])
    for step in (9, 19):  # the tenth and the twentieth
        for i in range(3):
            before, after = watch.looks[step - 1][i], watch.looks[step][i]
            weight, gradient = watch.weights[step][i], watch.gradients[step][i].abs()
            grown = after & (weight == 0)
            assert (grown & ~before).any()
            assert gradient[grown].min() >= gradient[~after].max()
            assert not (after & (weight != 0) & ~before).any()  # weights that were not kept before start at 0


def exchanges(grow, method=DynamicSparse):
    """Return, per exchange and layer, the weights before and after, both masks, and the number to exchange."""
    found = []

    class Spy(method):
        def after_step(self):
            weights, masks = [w.detach().clone() for w in self.weights], self.masks
            super().after_step()
            if self.masks is not masks:
                for before, now, old, new in zip(weights, self.weights, masks, self.masks, strict=True):
                    kept = int(old.sum())
                    found.append(
                        (
                            before,
                            now.detach().clone(),
                            old,
                            new,
                            min(round(self.exchange_fraction * kept), old.numel() - kept),
                        )
                    )

    run(Spy(7, grow, every=10))
    assert len(found) == 2 * 3
    return found


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_smallest_weights_of_a_layer_are_dropped(grow):
    for before, _, old, new, count in exchanges(grow):
        dropped = before[old & ~new].abs()
        assert len(dropped)
        assert dropped.max() <= before[old].abs().sort().values[count - 1]


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_weight_that_is_dropped_and_grown_at_once_keeps_its_value(grow):
    at_once = 0
    for before, now, old, new, count in exchanges(grow):
        assert torch.equal(now[old & new], before[old & new])
        assert not now[new & ~old].any()
        at_once += count - int((old & ~new).sum())
    assert at_once > 0


def test_set_grows_at_random_and_its_seed_decides():
    finals = [run(DynamicSparse(7, "random", every=3, seed=seed))[1].weights[-1] for seed in (0, 0, 1)]
    first, again, other = ([w != 0 for w in weights] for weights in finals)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_moments_of_grown_weights_are_zero_and_so_are_those_of_pruned_weights():
    moments = []

    class Spy(DynamicSparse):
        ever = None

        def after_step(self):
            masks = self.masks
            self.ever = masks if self.ever is None else [e | m for e, m in zip(self.ever, masks, strict=True)]
            super().after_step()
            for i, weight in enumerate(self.weights):
                state = self.optimizer.state[weight]
                grown = self.masks[i] & (weight == 0) if self.masks is not masks else torch.zeros_like(masks[i])
                never = ~self.ever[i]
                for name in ("exp_avg", "exp_avg_sq"):
                    moments.append((state[name][grown].clone(), state[name][never].clone(), state[name].clone()))

    run(Spy(7, "gradient", every=10))
    assert any(len(grown) for grown, _, _ in moments)
    assert any(len(never) for _, never, _ in moments)
    assert any(moment.any() for _, _, moment in moments)
    assert not any(grown.any() or never.any() for grown, never, _ in moments)


# Hyperflux


def test_hyperflux_follows_its_path_regrows_and_meets_the_target():
    method = Hyperflux(5, begin=0.1, end=0.9, depth=0.5, regrow=0.25, speed=8)
    long = Task("long", MLP.data, mlp, 40, 32, 1e-2, "error", (5,))
    _, watch, _ = run(method, long)
    kept = [nonzero(weights) for weights in watch.weights]
    steps = len(kept)
    assert kept[round(0.1 * steps) - 2] == 1020  # dense until pruning begins
    lowest = kept[round(0.7 * steps)]
    assert 0.3 * 204 < lowest < 0.9 * 204  # the path ends at half of the target
    assert kept[-1] == 204
    assert max(kept[round(0.7 * steps) : round(0.9 * steps) - 2]) > lowest  # some weights return before the cut


def test_weights_return_with_the_values_they_were_pruned_with_and_the_others_train():
    method = Hyperflux(5, begin=0.1, end=0.9, speed=8)
    task = Task("long", MLP.data, mlp, 20, 32, 1e-2, "error", (5,))
    _, watch, _ = run(method, task, look=lambda: [latent.clone() for latent in method.latent])
    returned, trained, kept = 0, 0, 0
    for i in range(3):
        at_pruning = watch.weights[0][i].clone()
        for step in range(1, len(watch.weights)):
            if not watch.looks[step] or not watch.looks[step - 1]:
                continue
            before, now, latent = watch.weights[step - 1][i], watch.weights[step][i], watch.looks[step][i]
            gone, back = (before != 0) & (now == 0), (before == 0) & (now != 0)
            at_pruning[gone] = latent[gone]
            assert torch.equal(now[back], at_pruning[back])
            returned += int(back.sum())
            stay = (before != 0) & (now != 0)
            trained, kept = trained + int((before != now)[stay].sum()), kept + int(stay.sum())
    assert returned > 10
    assert trained > 0.9 * kept


def test_flux_is_the_gradient_times_the_weight_plus_the_pressure():
    checked = []

    class Spy(Hyperflux):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients, masks = [w.grad.clone() for w in self.weights], self.masks
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self.latent:
                pressure = self.pressure if self.progress < 0.5 else 0.0
                parts = zip(gradients, self.latent, self.presences, masks, self.weights, strict=True)
                for g, w, t, mask, weight in parts:
                    torch.testing.assert_close(t.grad, g * w + pressure)
                    assert torch.equal(weight.grad, g * mask)
                checked.append(pressure)

    run(Spy(5, regrow=0.5, speed=8))
    assert checked[0] > 0
    assert checked[-1] == 0


# ModelPruning


def test_modelpruning_follows_the_cubic_at_the_ends_of_epochs():
    method = LightningPruning(10, begin=0.1, end=0.7)
    long = Task("long", MLP.data, mlp, 10, 32, 1e-2, "error", (10,))
    kept = []

    class Count(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            masks = [m.weight_mask for m in pl_module.modules() if hasattr(m, "weight_mask")]
            kept.append(sum(int(mask.sum()) for mask in masks) if masks else 1020)

    callbacks = method.callbacks
    method.callbacks = lambda: [*callbacks(), Count()]
    outcome, _, _ = run(method, long)
    cubic = [102 + round(918 * (1 - min(max((e / 10 - 0.1) / 0.6, 0), 1)) ** 3) for e in range(10)]
    assert kept == cubic
    assert kept[:2] == [1020, 1020]
    assert kept[7:] == [102] * 3
    assert outcome.compression == 10.0


def test_modelpruning_can_run_twice():
    method = LightningPruning(10)
    assert [train_and_test(MLP, method, 0, Path()).compression for _ in range(2)] == [10.0, 10.0]
