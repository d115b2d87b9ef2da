"""A whole pruning run in a plain torch loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import same, train
from torch import nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.pruner import Pruner
from lightning_autoprune.method.schedule import target_path
from lightning_autoprune.method.settings import Settings
from lightning_autoprune.method.update_rules import AdaptiveRule, AutoPruneRule
from lightning_autoprune.model.prunable_layers import prunable_weights
from lightning_autoprune.model.sparsity import sparsity


def make_problem(seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    return model, x, x[:, :4].argmax(1)


def start_pruner(model, steps: int, **settings) -> Pruner:
    pruner = Pruner(prunable_weights(model), Settings(**settings), steps)
    pruner.start()
    return pruner


@pytest.mark.parametrize("target", [0.0, 0.5, 0.9, 0.975])
@pytest.mark.parametrize("every", [1, 7])
def test_a_target_is_met_exactly_when_masks_become_final(target, every):
    model, x, y = make_problem()
    pruner = start_pruner(model, 300, target_sparsity=target, mask_every_n_steps=every, layer_floor=0)
    list(train(pruner, model, x, y, 300))
    kept = sum(int((weight != 0).sum()) for weight in pruner.weights.values())
    assert pruner.masks_final
    assert kept == round((1 - target) * 640)


def test_the_controller_follows_a_smooth_path_close_to_the_target():
    model, x, y = make_problem()
    pruner = start_pruner(model, 2000, target_sparsity=0.9, warmup=0, finetune=0)
    curve = list(train(pruner, model, x, y, 1999))
    assert curve[-1] == pytest.approx(0.9, abs=0.01)
    assert max(abs(b - a) for a, b in pairwise(curve)) < 0.04
    path = [1 - target_path((i + 1) / 2000, 1, 0.1) for i in range(1999)]
    distance = [abs(a - b) for a, b in zip(curve, path, strict=True)]
    assert max(distance) < 0.3  # the first steps prune the smallest weights at once
    assert sum(distance[200:]) / 1800 < 0.02


def test_without_a_target_more_pressure_prunes_more():
    results = []
    for pressure in (0.01, 0.1, 1.0):
        model, x, y = make_problem()
        pruner = start_pruner(model, 300, pressure=pressure)
        *_, last = train(pruner, model, x, y, 300)
        assert pruner.mu == pressure
        results.append(last)
    assert results == sorted(results)
    assert results[0] < results[2]


def test_weights_come_back_during_pruning():
    model, x, y = make_problem()
    pruner = start_pruner(model, 400, target_sparsity=0.8)
    before, revived = None, 0
    for _ in train(pruner, model, x, y, 400):
        masks = pruner.masks()
        if before:
            revived += sum(int((now & ~old).sum()) for old, now in zip(before, masks, strict=True))
        before = masks
    assert revived > 0


def test_masks_change_only_in_the_pruning_phase():
    model, x, y = make_problem()
    pruner = start_pruner(model, 100, target_sparsity=0.8, warmup=0.2, finetune=0.3)
    curve = list(train(pruner, model, x, y, 100))
    assert curve[:19] == [0] * 19
    assert pruner.layer_sparsity().keys() == {"0", "2"}
    assert len(set(curve[69:])) == 1


@pytest.mark.parametrize(("every", "remembered"), [(1, 100), (4, 25)])
def test_running_averages_remember_a_fortieth_of_the_auxiliary_steps(every, remembered):
    model, *_ = make_problem()
    pruner = start_pruner(model, 10_000, warmup=0, finetune=0.6, mask_every_n_steps=every)
    assert pruner.auxiliary.scale.decay == pytest.approx(1 - 1 / remembered)


def test_no_layer_is_emptied_by_a_huge_pressure():
    model, x, y = make_problem()
    pruner = start_pruner(model, 100, pressure=1000, layer_floor=0.02)
    list(train(pruner, model, x, y, 100))
    assert all(value <= 0.98 for value in pruner.layer_sparsity().values())


@pytest.mark.parametrize("stop", [5, 20, 41, 69, 70, 85])
def test_resuming_is_bit_exact_in_every_phase(stop):
    def make_run():
        model, x, y = make_problem()
        return model, x, y, torch.optim.Adam(model.parameters(), 0.01)

    settings = Settings(target_sparsity=0.8, warmup=0.1, finetune=0.3, mask_every_n_steps=2)
    model, x, y, optimizer = make_run()
    pruner = Pruner(prunable_weights(model), settings, 100)
    pruner.start()
    list(train(pruner, model, x, y, stop, optimizer))
    saved = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict(), pruner.state_dict()
    torch.save(saved, "state.pt")
    list(train(pruner, model, x, y, 100 - stop, optimizer))

    other, x, y, optimizer = make_run()
    weights, optimizer_state, state = torch.load("state.pt", weights_only=True)
    other.load_state_dict(weights)
    optimizer.load_state_dict(optimizer_state)
    resumed = Pruner(prunable_weights(other), settings, 100)
    resumed.load_state_dict(state)
    resumed.start()
    list(train(resumed, other, x, y, 100 - stop, optimizer))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(resumed.state_dict(), pruner.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1.0}, r"`target_sparsity` is 1.0; it must be a number in \[0, 1\). It is the fraction"),
        ({"target_sparsity": -0.1}, r"`target_sparsity` is -0.1; it must be a number in \[0, 1\)"),
        ({"target_sparsity": 95}, r"`target_sparsity` is 95; it must be a number in \[0, 1\)"),
        ({"target_sparsity": "high"}, r"`target_sparsity` is 'high'; it must be a number"),
        ({"pressure": 0}, r"`pressure` is 0; it must be a number in \(0, inf\)"),
        ({"auxiliary_lr": float("nan")}, "`auxiliary_lr` is nan"),
        ({"estimator": "relu"}, "`estimator` is 'relu'; allowed are 'linear'"),
        ({"update_rule": "sgd"}, "`update_rule` is 'sgd'; allowed are 'adaptive', 'autoprune', 'vanilla'"),
        ({"initial_m": "zero"}, "`initial_m` is 'zero'; allowed are 'fisher', 'magnitude', 'constant'"),
        ({"mask_every_n_steps": 0}, r"`mask_every_n_steps` is 0; it must be an integer in \[1, inf\)"),
        ({"mask_every_n_steps": 1.5}, r"`mask_every_n_steps` is 1.5; it must be an integer in \[1, inf\)"),
        ({"auxiliary_lr": float("inf")}, r"`auxiliary_lr` is inf; it must be a number in \(0, inf\)"),
        ({"warmup": 0.6, "finetune": 0.4}, "`warmup` 0.6 and `finetune` 0.4 leave no time to prune: together they"),
        ({"finetune": 1.0}, r"`finetune` is 1.0; it must be a number in \[0, 1\)"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(AutoPruneError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("rule", ["adaptive", "autoprune", "vanilla"])
def test_floors_and_target_hold_if_an_untrained_layer_keeps_the_density_off_its_path(rule):
    torch.manual_seed(0)
    weights = {"fixed": nn.Parameter(torch.randn(100, 100)), "trained": nn.Parameter(torch.randn(20, 100))}
    pruner = Pruner(weights, Settings(target_sparsity=0.9, update_rule=rule, warmup=0), 4000)
    pruner.start()
    m_is_finite = []
    for _ in range(4000):
        if pruner.due:
            assert pruner.auxiliary_step([None, torch.randn(20, 100)])
        pruner.end_step(lambda M: m_is_finite.extend(bool(m.isfinite().all()) for m in M.values()))
        assert pruner.layer_sparsity()["trained"] <= 0.999
    assert m_is_finite == [True, True]
    assert pruner.sparsity == 0.9


@pytest.mark.parametrize("gradient", [None, torch.full((4, 3), torch.nan)], ids=["none", "not finite"])
def test_the_pressure_does_not_change_while_m_takes_no_step(gradient):
    pruner = Pruner({"layer": nn.Parameter(torch.randn(4, 3))}, Settings(target_sparsity=0.5, warmup=0), 100)
    pruner.start()
    for _ in range(20):
        assert pruner.due
        pruner.auxiliary_step([gradient])
        pruner.end_step()
    assert pruner.mu == Settings().pressure
    pruner.auxiliary_step([torch.ones(4, 3)])
    pruner.end_step()
    assert pruner.mu != Settings().pressure


def test_a_target_below_the_floors_is_refused_at_once():
    model, *_ = make_problem()
    with pytest.raises(AutoPruneError, match=r"Keeping 6 of 640 weights is not possible: with `layer_floor=0.05`"):
        Pruner(prunable_weights(model), Settings(target_sparsity=0.99, layer_floor=0.05), 100)


def test_the_last_recorded_m_is_positive_for_exactly_the_kept_weights():
    layer, seen = torch.nn.Linear(30, 20), []
    pruner = Pruner({"layer": layer.weight}, Settings(target_sparsity=0.73), total_steps=40)
    pruner.start()
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for _ in range(40):
        layer(torch.randn(9, 30)).square().mean().backward()
        if pruner.due:
            pruner.auxiliary_step([layer.weight.grad])
        optimizer.step()
        pruner.after_weight_step()
        pruner.end_step(lambda M: seen.append(int((M["layer"] > 0).sum())))
    assert seen == [int(layer.weight.count_nonzero())] == [162]


def make_pruner(dtype=torch.float32, granularity="weight"):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in (("a", (9, 7)), ("b", (150, 120)))}
    weights |= {"c": torch.randn(3, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last)}
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    pruner = Pruner(weights, Settings(target_sparsity=0.5, warmup=0.1, finetune=0.2, auxiliary_lr=5), 20)
    pruner.start()
    return pruner


def take_pruner_steps(pruner, first, last):
    for step in range(first, last):
        gradients = {
            name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + ord(name)))
            for name, weight in pruner.weights.items()
        }
        if pruner.due:
            pruner.auxiliary_step([gradients[name].to(weight) for name, weight in pruner.weights.items()])
        for name, weight in pruner.weights.items():
            weight.sub_(gradients[name].to(weight), alpha=0.01)
        pruner.after_weight_step()
        pruner.end_step()


@pytest.mark.parametrize("step", [1, 8, 18])  # in each phase
def test_replaced_tensors_are_pruned_as_those_before_bit_by_bit(step):
    plain, replaced = make_pruner(), make_pruner()
    take_pruner_steps(plain, 0, 20)
    take_pruner_steps(replaced, 0, step)
    old = dict(replaced.weights)
    replaced.replace({name: weight.clone() for name, weight in old.items()})
    take_pruner_steps(replaced, step, 20)
    assert same(dict(replaced.weights), dict(plain.weights))
    assert same(replaced.state_dict(), plain.state_dict())
    assert not any(replaced.weights[name] is weight for name, weight in old.items())


@pytest.mark.parametrize("step", [1, 8, 18])
def test_masks_and_dormant_values_survive_a_change_of_dtype_of_one_layer(step):
    pruner = make_pruner()
    take_pruner_steps(pruner, 0, step)
    masks, M = pruner.masks(), dict(pruner.M)
    wide = {name: weight.double() if name == "a" else weight for name, weight in pruner.weights.items()}
    pruner.replace(wide)
    pruner.after_weight_step()
    assert same(pruner.masks(), masks)
    assert all(torch.equal(pruner.M[name], m.to(pruner.M[name])) for name, m in M.items())
    assert all((weight[~mask] == 0).all() for weight, mask in zip(wide.values(), masks, strict=False))
    take_pruner_steps(pruner, step, 20)
    assert pruner.sparsity == sparsity(pruner.weights) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("step", [1, 8, 18])
def test_a_missing_layer_is_forgotten_and_the_target_is_met_without_it(step):
    pruner = make_pruner()
    take_pruner_steps(pruner, 0, step)
    before = pruner.layer_sparsity()
    pruner.replace({name: weight for name, weight in pruner.weights.items() if name != "b"})
    assert pruner.layer_sparsity() == {name: before[name] for name in ("a", "c")}
    take_pruner_steps(pruner, step, 20)
    assert pruner.sparsity == sparsity(pruner.weights)
    if step < 18:
        assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("step", [1, 8, 18])
def test_a_pruner_without_layers_prunes_nothing(step):
    pruner = make_pruner()
    take_pruner_steps(pruner, 0, step)
    pruner.replace({})
    take_pruner_steps(pruner, step, 20)
    assert (pruner.sparsity, pruner.layer_sparsity(), pruner.masks(), dict(pruner.M)) == (0, {}, [], {})
    assert pruner.masks_final


@pytest.mark.parametrize("steps", [60, 200, 2000])
@pytest.mark.parametrize("target", [0.5, 0.9])
def test_the_sparsity_stays_within_two_points_of_its_path_at_every_step(steps, target):
    model, x, y = make_problem()
    pruner = start_pruner(model, steps, target_sparsity=target)
    phases = pruner.phases
    for step, sparsity_now in enumerate(train(pruner, model, x, y, phases.end - 1), 1):
        path = 1 - target_path(phases.progress(step), 1, 1 - target)
        assert sparsity_now == pytest.approx(path if step > phases.start else 0, abs=0.02)


def test_the_path_starts_at_the_density_of_the_weights_when_pruning_begins():
    model, x, y = make_problem()
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[torch.rand_like(weight) < 0.6] = 0
    dense = sparsity(model)
    pruner = start_pruner(model, 100, target_sparsity=0.9, warmup=0)
    curve = list(train(pruner, model, x, y, 60))
    assert curve[0] == pytest.approx(dense, abs=0.03)


def make_observing_pruner(weights, **settings):
    pruner = Pruner(weights, Settings(target_sparsity=0.5, warmup=0.5, finetune=0.2, **settings), 300)
    pruner.start()
    return pruner


def test_gradients_of_the_last_hundred_dense_steps_decide_which_weights_start_lowest():
    weights = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([1.0, 1.0])}
    pruner = make_observing_pruner(weights)
    observed = 0
    for _ in range(150):
        if pruner.observes:
            observed += 1
            pruner.observe({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([5.0, 4.0])})
        pruner.end_step()
    assert observed == 100
    assert torch.cat(list(pruner.M.values())).argsort().tolist() == [1, 2, 0, 4, 3]
    assert not pruner.observes


@pytest.mark.parametrize("settings", [{"initial_m": "magnitude"}, {"initial_m": "constant"}])
def test_nothing_is_observed_if_the_initial_m_does_not_need_it(settings):
    pruner = make_observing_pruner({"a": torch.ones(3)}, **settings)
    pruner.step = pruner.phases.start - 1
    assert not pruner.observes


@pytest.mark.parametrize("stop", [60, 149])
def test_what_was_observed_is_resumed(stop):
    def take(pruner, first, last):
        for step in range(first, last):
            if pruner.observes:
                pruner.observe({"a": torch.randn(6, generator=torch.Generator().manual_seed(step))})
            pruner.end_step()

    whole, stopped = (make_observing_pruner({"a": torch.ones(6)}) for _ in range(2))
    take(whole, 0, 150)
    take(stopped, 0, stop)
    resumed = Pruner({"a": torch.ones(6)}, stopped.settings, 300)
    resumed.load_state_dict(stopped.state_dict())
    resumed.start()
    take(resumed, stop, 150)
    assert torch.equal(whole.M["a"], resumed.M["a"])
    assert whole.M["a"].unique().numel() == 6


def test_short_runs_move_m_less_than_long_ones():
    adaptive = AdaptiveRule()
    totals = [adaptive.reach(steps) for steps in (24, 80, 800, 1500, 7_000, 10_000)]
    assert totals == sorted(totals)
    assert totals[0] < 0.01
    assert totals[-3:] == [1.0, 10.0, 10.0]
    assert AutoPruneRule().reach(24) == 1.0


def test_a_run_that_is_resumed_with_a_greater_length_does_not_go_back_on_its_path():
    model, x, y = make_problem()
    pruner = start_pruner(model, 100, target_sparsity=0.5, warmup=0.25)
    *_, reached = train(pruner, model, x, y, 55)
    resumed = Pruner(prunable_weights(model), pruner.settings, 200)
    resumed.load_state_dict(pruner.state_dict())
    resumed.start()
    curve = list(train(resumed, model, x, y, 60))
    assert reached > 0.3
    assert min(curve) > reached - 0.02


def run_two_layers(pruner, weights, steps, trained):
    """Run steps in which no weight moves; return the layers' sparsities after each."""
    generator, curve = torch.Generator().manual_seed(1), []
    for step in range(steps):
        if pruner.due and (names := trained(step)):
            gradients = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
            pruner.auxiliary_step([gradients[name] if name in names else None for name in weights])
        pruner.end_step()
        curve.append(list(pruner.layer_sparsity().values()))
    return curve


@pytest.mark.parametrize("later", [(), ("a",)])
def test_layers_whose_m_is_not_stepped_keep_their_masks_in_a_long_run(later):
    torch.manual_seed(0)
    weights = {"a": torch.randn(100, 100), "b": torch.randn(100, 100)}
    pruner = Pruner(weights, Settings(target_sparsity=0.95, warmup=0, finetune=0.5), 4000)
    pruner.start()
    curve = run_two_layers(pruner, weights, 70, lambda step: ("a", "b") if step < 60 else later)
    assert curve[59][1] > 0.05
    assert all(b == pytest.approx(curve[59][1], abs=0.002) for _, b in curve[60:])


def test_a_layer_that_joins_a_long_run_is_not_pruned_further_than_the_others():
    torch.manual_seed(0)
    weights = {"a": torch.randn(100, 100), "b": torch.randn(100, 100)}
    pruner = Pruner(dict(weights), Settings(target_sparsity=0.95, warmup=0, finetune=0.5), 4000)
    pruner.start()
    run_two_layers(pruner, weights, 60, lambda step: ("a", "b"))
    weights["c"] = torch.randn(100, 100)
    pruner.extend(weights)
    *_, last = run_two_layers(pruner, weights, 10, lambda step: ("a", "b", "c"))
    assert last[2] == pytest.approx(sum(last[:2]) / 2, abs=0.05)
