"""The callback with ``granularity="neuron"``, and with an ``example_input_array``."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import FEATURES, Net, Resumable, csv_logger, fit, loader, rows, saving
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_autoprune import (
    AutoPruneCallback,
    AutoPruneError,
    layer_sparsity,
    model_cost,
    prunable_weights,
    shrink,
    sparsity,
)


class ExampleNet(Net):
    def __init__(self, **options):
        super().__init__(hidden=32, **options)
        self.example_input_array = torch.zeros(2, FEATURES)


def neuron_callback(**options):
    return AutoPruneCallback(granularity="neuron", **options)


@pytest.mark.parametrize("target", [{"target_sparsity": 0.75}, {"target_flops": 0.25}])
def test_the_shrunk_model_meets_the_target(target):
    callback = neuron_callback(**target)
    model = ExampleNet()
    fit(callback, model=model, epochs=6)
    small = shrink(model, model.example_input_array)
    dense, left = (model_cost(m, torch.zeros(1, FEATURES)) for m in (model, small))
    assert 0.2 < left.flops / dense.flops <= 0.25
    assert callback.sparsity == pytest.approx(1 - small.first.out_features / 32)
    x = torch.randn(100, FEATURES)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_flops_are_logged_for_weights_and_for_neurons(tmp_path):
    for name, callback in (("w", AutoPruneCallback(target_sparsity=0.75)), ("n", neuron_callback(target_flops=0.25))):
        fit(callback, model=ExampleNet(), logger=csv_logger(tmp_path / name))
        curve = [row["autoprune/flops"] for row in rows(tmp_path / name) if "autoprune/flops" in row]
        assert curve[0] == 1
        assert curve[-1] == pytest.approx(1 - callback.sparsity)  # every weight is used once per sample


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_an_example_runs_in_the_precision_of_the_weights(precision, tmp_path):
    options = {"logger": csv_logger(tmp_path), "precision": precision}
    callback = neuron_callback(target_sparsity=0.5)
    fit(callback, model=ExampleNet(), **options)
    assert callback.sparsity >= 0.5
    assert 0 < rows(tmp_path)[-1]["autoprune/flops"] < 0.7


def test_without_an_example_no_flops_are_logged_and_neurons_are_refused(tmp_path):
    fit(AutoPruneCallback(target_sparsity=0.75), logger=csv_logger(tmp_path))
    assert not any("autoprune/flops" in row for row in rows(tmp_path))
    with pytest.raises(AutoPruneError) as error:
        fit(neuron_callback(target_flops=0.5))
    assert str(error.value) == (
        '`granularity="neuron"` needs to see how Net runs: set `self.example_input_array` in it to a batch of inputs'
        " of its `forward`."
    )


def test_an_example_that_fails_warns_for_weights_and_raises_for_neurons():
    class WrongExampleNet(Net):
        example_input_array = torch.zeros(2, 3)

    with pytest.warns(
        UserWarning, match="`example_input_array` does not run, so `autoprune/flops` is not logged: mat1"
    ):
        fit(AutoPruneCallback(), model=WrongExampleNet())
    with pytest.raises(
        AutoPruneError, match=r"WrongExampleNet could not be run on an example of shapes \[\(2, 3\)\]: layer 'first'"
    ):
        fit(neuron_callback(target_flops=0.5), model=WrongExampleNet())


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_running_the_example_does_not_change_training(granularity):
    def fit_weights(callbacks):
        torch.manual_seed(0)
        model = ExampleNet(noisy=True)
        fit(callbacks, model=model, epochs=2)
        return model.state_dict()

    # no m falls below 0 in so few steps, so any difference would come from the example
    quiet = AutoPruneCallback(granularity=granularity, held_out="train", auxiliary_lr=1e-9, warmup=0.0, finetune=0.0)
    plain, pruned = fit_weights([]), fit_weights([quiet])
    assert quiet.sparsity == 0
    assert all(torch.equal(value, pruned[name]) for name, value in plain.items())


@pytest.mark.parametrize("step", [5, 12, 28])  # in the dense, the pruning and the fine-tuning phase
def test_resuming_is_bit_exact(step, tmp_path):
    def run(steps, **options):
        torch.manual_seed(0)
        model, callback = ExampleNet(), neuron_callback(target_flops=0.3, auxiliary_lr=100.0)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit([callback, keep], model=model, train=Resumable(), epochs=4, enable_checkpointing=True, **options)
        return copy.deepcopy(model.state_dict()), callback

    uninterrupted, uninterrupted_callback = run(32)
    resumed, resumed_callback = run(32, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert uninterrupted_callback.sparsity == resumed_callback.sparsity > 0.5
    assert torch.equal(
        uninterrupted_callback._run.pruner.auxiliary.granularity.alive,
        resumed_callback._run.pruner.auxiliary.granularity.alive,
    )
    assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())


def test_a_checkpoint_of_the_other_granularity_is_refused(tmp_path):
    def fit_with(callback, **options):
        keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=12, enable_version_counter=False)
        fit([callback, keep], model=ExampleNet(), epochs=4, enable_checkpointing=True, **options)

    both = {"weights": AutoPruneCallback, "neurons": neuron_callback}
    for saved, resumed in (("weights", "neurons"), ("neurons", "weights")):
        fit_with(both[saved](target_sparsity=0.5))
        message = (
            f'The checkpoint\'s run pruned {saved}, and this callback has `granularity="{resumed[:-1]}"`: resume with'
        )
        with pytest.raises(AutoPruneError, match=message):
            fit_with(both[resumed](target_sparsity=0.5), ckpt_path=tmp_path / "last.ckpt")


class Compare(Callback):
    """Compares what the callback reports with the weights, and with the files that are saved."""

    def __init__(self, pruning):
        self.pruning, self.seen = pruning, []

    def _compare(self, weights):
        expected, literal = self.pruning.layer_sparsity(), layer_sparsity(weights)
        assert expected == pytest.approx(literal, abs=1e-12)
        assert self.pruning.sparsity == pytest.approx(sparsity(weights), abs=1e-12)
        assert [row.kept / row.weights for row in self.pruning.layers()] == pytest.approx(
            [1 - literal[name] for name in expected], abs=1e-12
        )
        self.seen.append(self.pruning.sparsity)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._compare(pl_module)
        if "autoprune/sparsity" in trainer.callback_metrics:
            assert float(trainer.callback_metrics["autoprune/sparsity"]) == pytest.approx(self.pruning.sparsity)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self._compare(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._compare(pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        saved = copy.deepcopy(pl_module)
        saved.load_state_dict(checkpoint["state_dict"])
        self._compare(saved)


@pytest.mark.parametrize(
    ("options", "trainer_options"),
    [
        ({}, {}),
        ({"held_out": "train"}, {"accumulate_grad_batches": 3}),
        ({"held_out": "val"}, {"val_check_interval": 3}),
        ({"mask_every_n_steps": 3}, {"accumulate_grad_batches": 2}),
    ],
)
def test_at_any_step_the_reported_sparsity_is_that_of_the_model_and_of_each_file(options, trainer_options, tmp_path):
    callback = neuron_callback(target_sparsity=0.5, auxiliary_lr=100.0, **options)
    compare, keep = Compare(callback), saving(tmp_path, every_n_train_steps=1)
    fit(
        [callback, compare, keep],
        model=ExampleNet(),
        val=loader(),
        epochs=6,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        **trainer_options,
    )
    assert len({*compare.seen}) > 3


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step"])
def test_a_run_that_is_interrupted_within_a_step_leaves_what_is_reported(hook):
    def interrupt(trainer, *_):
        if trainer.global_step == 12:
            raise ValueError("interrupted")

    callback, interrupting, model = neuron_callback(auxiliary_lr=300.0, pressure=1.0), Callback(), ExampleNet()
    setattr(interrupting, hook, interrupt)
    with pytest.raises(ValueError, match="interrupted"):
        fit([callback, interrupting], model=model)
    assert callback.sparsity == pytest.approx(sparsity(model), abs=1e-12) != 0


@pytest.mark.parametrize(("held_out", "manual"), [("train", False), (0.25, False), ("val", False), ("train", True)])
def test_neurons_come_back(held_out, manual):
    class WithoutBiases(ExampleNet):
        """Its pruned neurons get a gradient only if the weights that produce them have values."""

        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Linear(FEATURES, 32, bias=False), nn.Identity()
            self.automatic_optimization = not manual

        def training_step(self, batch):
            loss = super().training_step(batch)
            if not manual:
                return loss
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return None

    callback = neuron_callback(target_sparsity=0.5, held_out=held_out, auxiliary_lr=100.0)
    fit(callback, model=WithoutBiases(), val=loader(), epochs=6)
    assert sum(row.revived for row in callback.layers()) > 0


def test_rows_and_columns_of_pruned_neurons_are_zero():
    callback, model = neuron_callback(target_flops=0.3), ExampleNet()
    fit(callback, model=model)
    dead = ~callback._run.pruner.auxiliary.granularity.alive
    assert dead.any()
    weights = prunable_weights(model)
    assert not weights["last"][:, dead].any()
    assert not weights["first"][dead].any()


def test_a_layer_without_neurons_is_not_reported_as_unfrozen(recwarn):
    class RecurrentNet(ExampleNet):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(12, 12)

        def forward(self, x):
            return super().forward(self.lstm(x)[0])

    callback = neuron_callback(target_sparsity=0.5)
    fit(callback, model=RecurrentNet())
    assert set(callback.layer_sparsity()) == {"first", "last"}
    assert not [w for w in recwarn if "unfrozen" in str(w.message)]


def test_a_parametrized_layer_can_be_excluded(tmp_path):
    class SpectralNormNet(ExampleNet):
        def __init__(self):
            super().__init__()
            self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
            self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x):
            return self.head(torch.relu(self.last(torch.relu(self.first(x)))))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*example_input_array")
        callback = AutoPruneCallback(target_sparsity=0.5, exclude=["last"])
        fit(callback, model=SpectralNormNet(), logger=csv_logger(tmp_path))
    assert 0.5 < rows(tmp_path)[-1]["autoprune/flops"] < 1
    callback = neuron_callback(target_sparsity=0.1, exclude=["last"])
    fit(callback, model=SpectralNormNet())
    assert callback.sparsity >= 0.1


def test_neurons_concatenated_with_the_input_are_pruned():
    class ConcatenatingNet(ExampleNet):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(FEATURES + 32, 4)

        def forward(self, x):
            return self.last(torch.cat([x, torch.relu(self.norm(self.first(x)))], -1))

    model, _ = fit(neuron_callback(target_sparsity=0.5), model=ConcatenatingNet())
    assert shrink(model, model.example_input_array).first.out_features < 16
