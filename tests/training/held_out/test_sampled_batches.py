"""Holding samples out of batches of any class, in whole trainings: which samples, and what the user's loader sees."""

from __future__ import annotations

import random
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import fit, same, saving
from lightning.pytorch import Callback
from named_samples import KINDS, NamedSamples, Recorder, check_parts, named_loader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, Sampler

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.training.held_out.sampled_batches import SampledBatches

HELD_OUT = {"held_out": 0.25}  # does not fall back


def run(train, callbacks=(), read=KINDS["object"].read, settings=None, **options):
    """Fit; return the calls of ``training_step``, the model's state, the callback and the trainer."""
    callback = AutoPruneCallback(target_sparsity=0.8, **{"warmup": 0.25, **HELD_OUT, **(settings or {})})
    torch.manual_seed(0)
    model = Recorder(read)
    model, t = fit([callback, *callbacks], model=model, train=train, **options)
    return model.passes, dict(model.state_dict()), callback, t


# Batches of any class


@pytest.mark.parametrize("nest", [lambda x: {"images": x}, lambda x: [x]], ids=["dict", "list"])
def test_the_batches_of_one_loader_in_a_dict_or_list_are_nested_like_it(nest):
    read = KINDS["object"].read
    passes, state, *_ = run(named_loader("object"), read=read)
    (place,) = [0] if isinstance(nest(None), list) else nest(None)
    nested, nested_state, *_ = run(nest(named_loader("object")), read=lambda batch: read(batch[place]))
    assert (nested, same(nested_state, state)) == (passes, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_class_is_held_out_from_with_the_same_bits_for_any_number_of_workers(kind):
    passes, state, callback, _ = run(named_loader(kind), read=KINDS[kind].read)
    assert check_parts(passes) == callback._run.pruner.auxiliary.scale.updates > 5
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    with_workers = run(named_loader(kind, num_workers=2), read=KINDS[kind].read)
    assert (with_workers[0], same(with_workers[1], state)) == (passes, True)


OPTIONS = {
    "no dense phase": {"settings": {"warmup": 0.0, "finetune": 0.0}},
    "accumulation": {"accumulate_grad_batches": 3, "settings": {"warmup": 0.1, "finetune": 0.2}},
    "masks every 3 steps": {"settings": {"mask_every_n_steps": 3}},
    "few batches": {"limit_train_batches": 3},
    "max_steps": {"max_steps": 7, "epochs": 10},
    "reloading": {"reload_dataloaders_every_n_epochs": 1},
    "rare reloading": {"reload_dataloaders_every_n_epochs": 2, "settings": {"warmup": 0.1}},
    "overfitting": {"overfit_batches": 2},
}


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_workers_that_draw_ahead_change_nothing_under_any_option_of_the_trainer(name, persistent):
    if persistent and name in ("few batches", "max_steps", "masks every 3 steps", "overfitting"):
        return  # the same code as without
    options = {**OPTIONS[name], "shuffle": False}

    def fitted(**workers):
        train = named_loader(shuffle=options["shuffle"], **workers)
        return run(train, **{name: value for name, value in options.items() if name != "shuffle"})

    passes, state, callback, _ = fitted()
    assert check_parts(passes) == callback._run.pruner.auxiliary.scale.updates > 1
    with_workers = fitted(num_workers=2, persistent_workers=persistent)
    assert (with_workers[0], same(with_workers[1], state)) == (passes, True)


@pytest.mark.parametrize("workers", [1, 2])
def test_lists_that_workers_drew_before_training_are_drawn_again(workers):
    settings = {"warmup": 0.0, "finetune": 0.0}
    first, state, *_ = run(named_loader(num_workers=workers, shuffle=False), settings=settings, epochs=1)
    assert [len(found.numbers) for found in first] == [12, 4] * 4
    assert same(run(named_loader(shuffle=False), settings=settings, epochs=1)[1], state)
    assert sorted(number for found in first for number in found.numbers) == list(range(64))


# The user's objects


def test_the_users_loader_is_the_trainers_own_and_whole_during_and_after_the_fit():
    class Iterates(Callback):
        """Looks at the loader in every phase, as callbacks that compute statistics of the data do."""

        sizes: list[int] = []  # noqa: RUF012

        def look(self, trainer, *_):
            self.check(trainer)
            state = torch.get_rng_state()  # an iterator draws its base seed
            self.sizes += [len(batch._content[0]) for batch in trainer.train_dataloader]
            torch.set_rng_state(state)

        def check(self, trainer):
            assert trainer.train_dataloader is trainer.fit_loop._combined_loader.iterables
            assert trainer.train_dataloader is loader
            assert loader.batch_sampler is batch_sampler

        on_train_start = on_train_epoch_start = on_train_batch_end = on_train_end = look

    def fitted(*callbacks):
        return run(loader, callbacks, epochs=4)

    loader = named_loader(shuffle=False)
    batch_sampler = loader.batch_sampler
    before = {name: value for name, value in vars(loader).items() if name != "_iterator"}
    plain = fitted()
    watched = fitted(Iterates())
    assert set(Iterates.sizes) == {16}
    assert len(Iterates.sizes) > 50
    assert (watched[0], same(watched[1], plain[1])) == (plain[0], True)
    assert {name: value for name, value in vars(loader).items() if name != "_iterator"} == before
    assert type(loader) is DataLoader


def test_the_users_random_numbers_are_those_of_a_run_that_holds_nothing_out():
    def states(held_out, workers):
        generator = torch.Generator().manual_seed(3)
        random.seed(0)
        np.random.seed(0)
        train = named_loader(generator=generator, num_workers=workers)
        run(train, settings={"held_out": held_out, "warmup": 0.0})
        return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate(), generator.get_state()

    assert same(states(0.25, 0), states("train", 0))
    assert same(states(0.25, 2), states("train", 2))


class Counting(NamedSamples):
    """Counts the samples that are loaded."""

    loaded = 0

    def __getitem__(self, index):
        self.loaded += 1
        return super().__getitem__(index)


def test_no_more_samples_are_loaded_than_without_pruning_but_for_the_trial():
    dataset = Counting()
    run(named_loader(dataset=dataset), settings={"warmup": 0.0}, epochs=3)
    assert dataset.loaded == 3 * 64 + 16 + 16


# Kinds of loaders


class Generating(DataLoader):
    def __iter__(self):
        for batch in super().__iter__():  # noqa: UP028
            yield batch


class Reading(DataLoader):
    """Draws the batches itself, so that it never asks its batch sampler."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = [self.collate_fn([self.dataset[i] for i in range(k, k + 16)]) for k in range(0, 64, 16)]

    def __iter__(self):
        return iter(self.own)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("epochs", "warmup"), [(4, 0.25), (2, 0.25), (2, 0.0)], ids=["later pass", "first pass", "first batch"]
)
def test_a_loader_whose_iterator_is_a_generator_is_split(epochs, warmup, workers):
    def fitted(kind, **options):
        train = kind(NamedSamples(), 16, collate_fn=KINDS["object"].collate, **options)
        return run(train, settings={"warmup": warmup}, epochs=epochs)

    passes, state, *_ = fitted(Generating, num_workers=workers)
    plain = fitted(DataLoader)
    assert (passes, same(state, plain[1])) == (plain[0], True)


def test_a_loader_that_does_not_draw_from_its_batch_sampler_falls_back():
    def train():
        return Reading(NamedSamples(), 16, collate_fn=KINDS["object"].collate)

    message = "the loader, a Reading, does not draw from its batch sampler"
    with pytest.raises(AutoPruneError, match=message):
        run(train())
    with pytest.warns(UserWarning, match=message):
        found = run(train(), settings={"held_out": None})
    expected = run(train(), settings={"held_out": "train"})
    assert (found[0], same(found[1], expected[1])) == (expected[0], True)


class Lists(Sampler):
    """A batch sampler without a length, which yields lists of some kind."""

    def __init__(self, kind, empty=()):
        self.kind, self.empty = kind, empty

    def __iter__(self):
        for i, k in enumerate(range(0, 64, 16)):
            yield self.kind([] if i in self.empty else range(k, k + 16))


@pytest.mark.parametrize("kind", [list, tuple, lambda r: torch.tensor(list(r)), np.array, lambda r: r])
@pytest.mark.parametrize("workers", [0, 1])
def test_lists_of_any_kind_are_split_and_keep_it(kind, workers):
    seen = []

    class Noting(NamedSamples):
        def __getitems__(self, indices):
            seen.append(type(indices))
            return [self[index] for index in indices]

    train = named_loader(dataset=Noting(), batch_sampler=Lists(kind), num_workers=workers)
    passes, _, callback, _ = run(train, epochs=-1, max_steps=16)
    assert check_parts(passes) > 5
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
    assert passes == run(named_loader(batch_sampler=Lists(list)), epochs=-1, max_steps=16)[0]
    given = type(kind(range(2)))
    assert set(seen) == (set() if workers else {given, list} if given is range else {given})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_list_of_lists_as_batch_sampler_is_split(workers):
    lists = [list(range(k, k + 16)) for k in range(0, 64, 16)]
    passes, *_ = run(named_loader(batch_sampler=lists, num_workers=workers))
    assert check_parts(passes) > 5
    assert lists == [list(range(k, k + 16)) for k in range(0, 64, 16)]


def test_an_empty_list_is_left_to_the_users_code():
    class Careful(Recorder):
        def training_step(self, batch):
            return super().training_step(batch) if batch is not None else None

    def collate(samples):
        return KINDS["object"].collate(samples) if samples else None

    for empty in (2, 0):
        train = named_loader(batch_sampler=Lists(list, empty=[empty]), collate_fn=collate)
        callback = AutoPruneCallback(target_sparsity=0.8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, _ = fit(callback, model=Careful(), train=train, epochs=-1, max_steps=16)
        fell_back = any("nothing can be held out" in str(w.message) for w in caught)
        assert fell_back == (empty == 0)
        assert (check_parts(model.passes) > 3) == (empty == 2)
        assert callback.sparsity == pytest.approx(0.8, abs=0.01)


def test_a_collate_function_that_needs_whole_batches_falls_back():
    def collate(samples):
        assert len(samples) == 16, "16 samples, please"
        return KINDS["object"].collate(samples)

    message = "a part of a batch can't be loaded: AssertionError: 16 samples, please"
    with pytest.raises(AutoPruneError, match=message):
        run(named_loader(collate_fn=collate))
    with pytest.warns(UserWarning, match=message):
        found = run(named_loader(collate_fn=collate), settings={"held_out": None})
    expected = run(named_loader(collate_fn=collate), settings={"held_out": "train"})
    assert (found[0], same(found[1], expected[1])) == (expected[0], True)


def test_an_error_while_a_held_out_batch_is_loaded_names_it_and_the_step():
    class Shrinking(NamedSamples):
        is_short = False

        def __getitem__(self, index):
            if self.is_short:
                raise IndexError(f"sample {index} is gone")
            return super().__getitem__(index)

    class Shrinks(Callback):
        def on_after_backward(self, trainer, pl_module):
            dataset.is_short = trainer.global_step == 5

    dataset = Shrinking()
    callback = AutoPruneCallback(warmup=0.1)
    message = (
        r"^At training step 5, loading the held-out batch \(`held_out`\) raised IndexError: sample \d+ is gone.*train"
    )
    with pytest.raises(AutoPruneError, match=message) as error:
        fit([Shrinks(), callback], model=Recorder(), train=named_loader(dataset=dataset))
    assert isinstance(error.value.__cause__, IndexError)


def test_a_dataset_that_grows_between_epochs_is_held_out_from_as_it_is():
    class Growing(NamedSamples):
        size = 32

        def __len__(self):
            return self.size

    class Grows(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            train.dataset.size += 8

    train = named_loader(dataset=Growing(), num_workers=1)
    callback = AutoPruneCallback(target_sparsity=0.8, **HELD_OUT, warmup=0.0, finetune=0.0)
    model = Recorder()
    fit([callback, Grows()], model=model, train=train, epochs=4)
    assert max(number for found in model.passes for number in found.numbers) > 40
    assert max(number for found in model.passes if found.is_held_out for number in found.numbers) > 40


def test_batches_too_small_to_split_are_trained_on_whole():
    passes, *_ = run(named_loader(dataset=NamedSamples(35)), settings={"warmup": 0.0, "finetune": 0.0}, epochs=1)
    assert [len(found.numbers) for found in passes] == [12, 4, 12, 4, 3]


@pytest.mark.parametrize(
    "loader",
    [
        [1, 2],
        DataLoader(range(4), batch_size=None),
        DataLoader(type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(range(4))})()),
    ],
)
def test_a_loader_without_index_lists_has_none_to_split(loader):
    assert not SampledBatches.can_split(loader)


# Resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_resumes_in_the_pruning_phase_ends_with_the_same_bits(tmp_path, workers):
    def fitted(folder, **options):
        # another order in each epoch, by its number; Lightning resumes such a sampler wrongly if workers draw ahead
        order = DistributedSampler(range(64), num_replicas=1, rank=0, shuffle=not workers)
        train = named_loader(num_workers=workers, sampler=order, shuffle=None)
        save = saving(str(tmp_path / folder), every_n_epochs=1, save_on_train_epoch_end=True)
        passes, state, callback, _ = run(train, [save], enable_checkpointing=True, **options)
        return passes, state, callback.state_dict()

    passes, *whole = fitted("whole")
    resumed_passes, *resumed = fitted("resumed", ckpt_path=tmp_path / "whole" / "step=8.ckpt")
    assert any(found.is_held_out for found in resumed_passes)
    assert resumed_passes == [found for found in passes if found.epoch >= 2]
    assert same(resumed, whole)


@pytest.mark.parametrize(
    ("workers", "shuffle"), [(0, False), (2, True)]
)  # torchdata resumes (0, True) in another order
def test_a_stateful_loader_resumes_in_the_middle_of_an_epoch_with_the_same_bits(tmp_path, workers, shuffle):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def fitted(folder, **options):
        generator = torch.Generator().manual_seed(3)
        train = stateful.StatefulDataLoader(
            NamedSamples(),
            16,
            shuffle=shuffle,
            generator=generator,
            num_workers=workers,
            collate_fn=KINDS["object"].collate,
        )
        save = saving(str(tmp_path / folder), every_n_train_steps=1)
        passes, state, callback, _ = run(train, [save], enable_checkpointing=True, **options)
        return passes, state, callback.state_dict()

    passes, *whole = fitted("whole")
    assert check_parts(passes) > 5
    for step in (3, 6):
        resumed_passes, *resumed = fitted("resumed", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert any(found.is_held_out for found in resumed_passes)
        assert resumed_passes == passes[-len(resumed_passes) :]
        assert same(resumed, whole)


# A loader by itself


def test_the_order_within_a_batch_stays():
    passes, *_ = run(named_loader(shuffle=False), settings={"warmup": 0.0, "finetune": 0.0}, epochs=2)
    assert all(a < b for found in passes for a, b in pairwise(found.numbers))


def test_samples_are_drawn_anew_in_each_epoch_by_the_seed():
    def held(seed):
        passes, *_ = run(named_loader(shuffle=False), settings={"warmup": 0.0, "finetune": 0.0, "seed": seed}, epochs=3)
        return [tuple(found.numbers) for found in passes if found.is_held_out]

    assert held(0) == held(0)
    assert held(0) != held(1)
    first = held(0)
    assert len({*first[::4]}) == 3


def test_a_batch_sampler_of_the_users_own_class_keeps_its_attributes():
    class Bucketed(BatchSampler):
        epochs = 0

        def set_epoch(self, epoch):
            self.epochs += 1

        def __iter__(self):
            assert len(self) == 4
            self.passes = getattr(self, "passes", 0) + 1
            return super().__iter__()

    sampler = Bucketed(RandomSampler(range(64)), 16, False)
    run(named_loader(batch_sampler=sampler), epochs=4)
    assert sampler.passes == 4


class Requests(NamedSamples):
    """Takes the samples of a batch in a dict, with more that it needs to know."""

    def __getitems__(self, request):
        return [self[index] for index in request["indices"]]


def test_a_batch_sampler_that_gives_no_list_of_indices_falls_back():
    class Dicts(Sampler):
        def __len__(self):
            return 4

        def __iter__(self):
            return iter([{"indices": range(i, i + 16), "size": 3} for i in range(0, 64, 16)])

    train = DataLoader(Requests(), batch_sampler=Dicts(), collate_fn=KINDS["object"].collate)
    with pytest.raises(AutoPruneError, match="the indices of a batch, a dict, can't be divided: KeyError"):
        run(train)
    with pytest.warns(UserWarning, match="nothing can be held out"):
        passes, _, callback, _ = run(train, settings={"held_out": None})
    assert {len(found.numbers) for found in passes} == {16}
    assert callback.sparsity == pytest.approx(0.8, abs=0.01)
