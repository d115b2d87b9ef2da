"""The auxiliary step, the masks and the state of ``AuxiliaryParameters``."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import flat, optimizer, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_autoprune.errors import AutoPruneError
from lightning_autoprune.method.auxiliary import AuxiliaryParameters
from lightning_autoprune.model.prunable_layers import prunable_weights


def make_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))


def attach(model: nn.Module, **options) -> AuxiliaryParameters:
    return AuxiliaryParameters(prunable_weights(model), **options)


def random_gradients(aux: AuxiliaryParameters) -> list[torch.Tensor]:
    return [torch.randn_like(weight) for weight in aux.weights.values()]


def take_weight_step(model: nn.Module, aux: AuxiliaryParameters, opt: torch.optim.Optimizer) -> None:
    opt.zero_grad()
    model(torch.randn(5, 1, 6, 6)).square().sum().backward()
    aux.mask_gradients()
    opt.step()
    aux.after_weight_step()


# Attach and detach


def test_attaching_leaves_the_model_unchanged():
    model = make_network()
    before = copy.deepcopy(model.state_dict())
    identities = [id(p) for p in model.parameters()]
    attach(model)
    assert same(dict(model.state_dict()), dict(before))
    assert [id(p) for p in model.parameters()] == identities


def test_detaching_leaves_only_plain_weights():
    model, plain = make_network(), make_network()
    aux = attach(model)
    aux.step(random_gradients(aux), lr=0.1, mu=1)
    aux.update_masks()
    T = [weight.detach().clone() for weight in model.parameters()]
    aux.detach()
    assert same(T, [weight.detach() for weight in model.parameters()])
    assert aux.weights == {}
    for module, plain_module in zip(model.modules(), plain.modules(), strict=True):
        assert module.__dict__.keys() == plain_module.__dict__.keys()
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    for parameter, plain_parameter in zip(model.parameters(), plain.parameters(), strict=True):
        assert type(parameter) is nn.Parameter
        assert parameter.__dict__.keys() == plain_parameter.__dict__.keys()
        assert not parameter._backward_hooks
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


def test_magnitude_initialization_is_relative_to_each_layer():
    model = make_network()
    with torch.no_grad():
        model[3].weight.mul_(100)
    aux = attach(model, initial_m="magnitude", initial_scale=0.2)
    assert aux.M[1].mean() == pytest.approx(aux.M[2].mean(), rel=0.5)


# T = W ⊙ h(M)

rates_and_pressures = st.lists(st.tuples(st.floats(0.001, 0.5), st.floats(0, 2)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(rates_and_pressures, st.sampled_from(["linear", "hard_sigmoid", "leaky_relu", "softplus"]), st.integers(0, 99))
def test_weights_are_zero_exactly_where_m_is_not_positive(steps, estimator, seed):
    torch.manual_seed(seed)
    model = make_network()
    aux = attach(model, estimator=estimator)
    for lr, mu in steps:
        aux.step(random_gradients(aux), lr, mu)
        aux.update_masks()
        for weight, W, M in zip(aux.weights.values(), aux.W, aux.M, strict=True):
            assert torch.equal(weight == 0, M <= 0)
            assert torch.equal(weight[M > 0], W[M > 0])
            assert not torch.signbit(weight[M <= 0]).any()
        assert aux.kept == [int((M > 0).sum()) for M in aux.M]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_pruned_weight_comes_back_with_its_exact_value(name):
    model = make_network()
    opt = optimizer(name, model.parameters())
    aux = attach(model)
    for _ in range(5):  # builds up momentum, which would move pruned weights
        take_weight_step(model, aux, opt)
    before = [W.clone() for W in aux.W]
    pruned = [torch.rand_like(W) < 0.5 for W in aux.W]
    for M, mask in zip(aux.M, pruned, strict=True):
        M[mask] = -1
    aux.update_masks()
    for _ in range(20):
        take_weight_step(model, aux, opt)
        assert all((w[mask] == 0).all() for w, mask in zip(aux.weights.values(), pruned, strict=True))
    trained = [weight.detach().clone() for weight in aux.weights.values()]
    for M, mask in zip(aux.M, pruned, strict=True):
        M[mask] = 1
    aux.update_masks()
    for weight, mask, old, new in zip(aux.weights.values(), pruned, before, trained, strict=True):
        assert torch.equal(weight[mask], old[mask])
        assert torch.equal(weight[~mask], new[~mask])
        assert not torch.equal(new[~mask], old[~mask])


def test_only_gradients_of_pruned_weights_are_masked():
    model = make_network()
    aux = attach(model)
    aux.M[1][:, ::2] = -1
    aux.update_masks()
    model(torch.randn(5, 1, 6, 6)).sum().backward()
    gradient = model[3].weight.grad.clone()
    assert (gradient[:, ::2] != 0).any()
    aux.mask_gradients()
    assert (model[3].weight.grad[:, ::2] == 0).all()
    assert torch.equal(model[3].weight.grad[:, 1::2], gradient[:, 1::2])


def test_masking_gradients_skips_layers_without_a_gradient():
    model = make_network()
    aux = attach(model)
    aux.mask_gradients()
    assert model[3].weight.grad is None


# The auxiliary step


@pytest.mark.parametrize("power", [-20, 20])
def test_masks_do_not_depend_on_the_scale_of_the_loss(power):
    model = make_network()
    a, b = attach(model), attach(copy.deepcopy(model))
    for _ in range(5):
        gradients = random_gradients(a)
        a.step(gradients, 0.02, 0.5)
        b.step([g * 2.0**power for g in gradients], 0.02, 0.5)
    assert same(a.M, b.M)
    assert any((M <= 0).any() for M in a.M)


def test_no_step_is_taken_if_a_gradient_is_not_finite():
    aux = attach(make_network())
    before = copy.deepcopy(aux.M)
    gradients = random_gradients(aux)
    gradients[1][0, 0] = float("nan")
    assert not aux.step(gradients, 0.1, 1)
    assert same(aux.M, before)
    assert aux.step(random_gradients(aux), 0.1, 1)


def test_with_zero_gradients_only_the_pressure_moves_m():
    aux = attach(make_network(), update_rule="autoprune")
    before = copy.deepcopy(aux.M)
    assert aux.step([torch.zeros_like(M) for M in aux.M], lr=0.1, mu=0.5)
    for M, old in zip(aux.M, before, strict=True):
        torch.testing.assert_close(M, old - 0.05)


def test_half_precision_weights_have_m_in_single_precision():
    aux = attach(make_network().bfloat16())
    assert all(M.dtype == torch.float32 for M in aux.M)
    aux.step([g.bfloat16() for g in random_gradients(aux)], 0.1, 1)
    aux.update_masks()
    assert 0 < aux.sparsity < 1


def test_outside_changes_to_kept_weights_are_adopted():
    """Weight clipping, a callback or ``load_state_dict`` may write to weights after the step."""
    model = make_network()
    aux = attach(model)
    aux.M[1][:, ::2] = -1
    aux.update_masks()
    dormant = aux.W[1][:, ::2].clone()
    with torch.no_grad():
        model[3].weight.fill_(7)  # pruned entries too
    aux.step(random_gradients(aux), 1e-6, 0)
    aux.update_masks()
    assert (model[3].weight[:, 1::2] == 7).all()
    assert (model[3].weight[:, ::2] == 0).all()
    assert torch.equal(aux.W[1][:, ::2], dormant)


def test_channels_last_weights_are_pruned_like_contiguous_ones():
    model = make_network()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    a, b = attach(model), attach(other)
    for aux in (a, b):
        torch.manual_seed(5)
        aux.step(random_gradients(aux), 0.1, 1)
        aux.keep(99)
    assert same(a.masks(), b.masks())
    assert same(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("initial_m", ["magnitude", "fisher"])
def test_a_layer_without_a_usable_magnitude_starts_at_a_constant_with_a_warning(initial_m, value):
    model = make_network()
    nn.init.constant_(model[5].weight, value)
    usable = {name: weight.detach().clone() for name, weight in list(prunable_weights(model).items())[:-1]}
    with pytest.warns(UserWarning, match="The weights of '5' are all 0, or some are not finite"):
        aux = attach(model, initial_m=initial_m)
    assert (aux.M[-1] == torch.tensor(0.1)).all()
    assert same(aux.M[:-1], AuxiliaryParameters(usable, initial_m=initial_m).M)


def test_initial_m_by_saliency_compares_weights_of_all_layers():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, -8.0])}
    fisher = {"a": torch.tensor([16.0, 16.0]), "b": torch.tensor([1.0, 1.0])}
    aux = AuxiliaryParameters(weights, initial_m="fisher", initial_scale=0.5, fisher=fisher)
    S = torch.tensor([2.0, 4.0, 4.0, 8.0])  # abs(w) times the fourth root of F
    torch.testing.assert_close(torch.cat(aux.M), 0.5 * S / S.square().mean().sqrt(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("fisher", [{}, {"a": torch.tensor([9.0, 9.0])}])
def test_a_layer_without_fisher_information_starts_as_if_its_weights_were_like_the_others(fisher):
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, -8.0])}
    aux = AuxiliaryParameters(weights, initial_m="fisher", fisher=fisher)
    magnitudes = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = 0.1 * magnitudes / magnitudes.square().mean().sqrt()
    torch.testing.assert_close(torch.cat(aux.M), expected)


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("density", [0.9, 0.5, 0.03])
def test_masks_with_a_common_threshold_nearly_meet_a_density_and_m_moves_by_a_share_of_it(density, share):
    torch.manual_seed(0)
    aux = AuxiliaryParameters({"a": torch.randn(200, 100), "b": torch.randn(500)}, layer_floor=0)
    before = torch.cat([M.flatten() for M in aux.M])
    aux.approach(density, [0, 1], share)
    masks = torch.cat([mask.flatten() for mask in aux.masks()])
    assert aux.density == pytest.approx(density, rel=0.003)
    assert before[masks].min() > before[~masks].max(), "one threshold for all layers"
    shifts = before - torch.cat([M.flatten() for M in aux.M])
    threshold = float(before[~masks].max())  # between it and the next larger m
    torch.testing.assert_close(shifts, torch.full_like(shifts, share * threshold), rtol=0.02, atol=2e-4)


def test_a_threshold_leaves_m_as_it_is_even_where_a_layer_keeps_its_floor():
    weights = {"x": torch.linspace(3, 4, 1000), "y": torch.linspace(1, 2, 1000)}
    aux = AuxiliaryParameters(weights, layer_floor=0.1)
    before = [M.clone() for M in aux.M]
    aux.approach(0.3, [0, 1], share=0.0)
    assert same(aux.M, before)
    assert aux.kept[1] == 100
    assert bool(aux.masks()[1][-100:].all())


def test_a_threshold_that_is_absorbed_leaves_the_masks_as_they_are():
    aux = AuxiliaryParameters({"a": torch.randn(200, 100, generator=torch.Generator().manual_seed(0))})
    aux.approach(0.3, [0], share=0.25)
    masks = aux.masks()
    aux.absorb_threshold()
    aux.update_masks()
    assert same(aux.masks(), masks)


def test_masks_with_a_threshold_are_saved_as_they_are():
    weights = {"a": torch.randn(200, 100, generator=torch.Generator().manual_seed(0))}
    aux = AuxiliaryParameters(weights)
    aux.approach(0.3, [0], share=0.0)
    resumed = AuxiliaryParameters({"a": weights["a"].clone()}, initial_m=None)
    resumed.load_state_dict(aux.state_dict())
    assert same(resumed.masks(), aux.masks())
    assert same(resumed.M, aux.M)
    assert same(resumed.W, aux.W)
    assert resumed.threshold == aux.threshold > 0


def test_the_next_update_of_the_masks_forgets_the_threshold():
    aux = AuxiliaryParameters({"a": torch.randn(200, 100, generator=torch.Generator().manual_seed(0))})
    masks = aux.masks()
    aux.approach(0.3, [0], share=0.0)
    assert aux.density == pytest.approx(0.3, rel=0.003)
    aux.update_masks()
    assert same(aux.masks(), masks)


def test_a_layer_that_was_never_written_and_gets_no_gradient_stops_no_step():
    model = make_network()
    nn.init.constant_(model[5].weight, torch.nan)
    with pytest.warns(UserWarning, match="'5'"):
        aux = attach(model)
    gradients = random_gradients(aux)
    assert not aux.step(gradients, 0.1, 1)  # NaN where the loss uses the weights
    gradients[-1].zero_()
    before = [M.clone() for M in aux.M]
    assert aux.step(gradients, 0.1, 1)
    aux.update_masks()
    assert all(M.isfinite().all() and not torch.equal(M, old) for M, old in zip(aux.M, before, strict=True))
    state, weights = aux.state_dict(), copy.deepcopy(model)
    resumed = attach(weights, initial_m=None)
    resumed.load_state_dict(state)
    assert same(resumed.masks(), aux.masks())


# Floors and counts


def test_every_layer_keeps_its_floor_under_huge_pressure():
    aux = attach(make_network(), layer_floor=0.1)
    for _ in range(3):
        aux.step(random_gradients(aux), lr=1, mu=50)
        aux.update_masks()
        assert aux.kept == aux.floors == [4, 52, 3]
    assert all((M > 0).sum() == k for M, k in zip(aux.M, aux.kept, strict=True))


def test_keep_meets_and_reports_the_exact_count():
    model = make_network()
    aux = attach(model)
    aux.keep(100)
    assert sum(int((weight != 0).sum()) for weight in aux.weights.values()) == 100 == sum(aux.kept)
    assert aux.density == 100 / 572
    assert aux.sparsity == 472 / 572


# Final masks and state


def test_final_masks_hold_under_momentum_without_latent_weights():
    model = make_network()
    opt = optimizer("adam", model.parameters())
    aux = attach(model)
    for _ in range(3):
        take_weight_step(model, aux, opt)
    aux.keep(80)
    aux.finalize_masks()
    assert aux.W == aux.M == []
    masks = aux.masks()
    before = flat(model)
    for _ in range(5):
        take_weight_step(model, aux, opt)
    assert all(torch.equal(w != 0, mask) for w, mask in zip(aux.weights.values(), masks, strict=True))
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("final", [False, True])
def test_state_is_restored_exactly_and_loads_with_weights_only(final):
    torch.manual_seed(1)
    model = make_network()
    aux = attach(model)
    aux.step(random_gradients(aux), 0.1, 1)
    aux.update_masks()
    if final:
        aux.finalize_masks()
    file = io.BytesIO()
    torch.save({"weights": model.state_dict(), "auxiliary": aux.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = make_network()
    other.load_state_dict(loaded["weights"])
    restored = attach(other)
    restored.load_state_dict(loaded["auxiliary"])
    assert same(restored.M, aux.M)
    assert same(restored.W, aux.W)
    assert same(restored.masks(), aux.masks())
    assert (restored.kept, restored.masks_final, restored.scale) == (aux.kept, aux.masks_final, aux.scale)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_the_error_for_state_of_other_layers_names_the_differences():
    state = attach(make_network()).state_dict()
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 9), nn.Linear(9, 3))
    message = (
        r"layer '5' of the checkpoint is missing; layer '4' is not in the checkpoint; layer '3' has shape \(9, 64\) and"
        r" \(8, 64\) in the checkpoint\. Build the same model"
    )
    with pytest.raises(AutoPruneError, match=message):
        attach(other).load_state_dict(state)


@pytest.mark.parametrize(("saved_rule", "rule"), [("adaptive", "autoprune"), ("vanilla", "adaptive")])
def test_state_of_a_rule_with_other_running_averages_is_refused(saved_rule, rule):
    layers = {"layer": torch.nn.Parameter(torch.randn(3, 4))}
    state = AuxiliaryParameters(layers, update_rule=saved_rule).state_dict()
    with pytest.raises(AutoPruneError, match=f"state is of another update rule than '{rule}': resume with the same"):
        AuxiliaryParameters(layers, update_rule=rule).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"update_rule": "magic"},
            "`update_rule` is 'magic'; allowed are 'adaptive', 'autoprune', 'vanilla', or an instance",
        ),
        ({"estimator": "step"}, "`estimator` is 'step'; allowed are 'linear', 'hard_sigmoid'"),
        ({"initial_m": "random"}, "`initial_m` is 'random'; allowed are 'fisher', 'magnitude', 'constant'."),
        ({"initial_scale": 0}, r"`initial_scale` is 0; it must be a number in \(0, inf\)."),
        ({"leaky_slope": 2}, r"`leaky_slope` is 2; it must be a number in \[0, 1\]."),
        ({"layer_floor": 1.0}, r"`layer_floor` is 1.0; it must be a number in \[0, 1\)."),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(AutoPruneError, match=message):
        attach(make_network(), **options)


def test_a_state_of_an_earlier_version_is_refused():
    with pytest.raises(AutoPruneError, match="was written by an earlier version and can't be resumed: start from the"):
        attach(make_network()).load_state_dict({"shapes": {}, "frozen": False, "squares": []})
