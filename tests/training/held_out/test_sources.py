"""Which source of held-out data each value of the callback's ``held_out`` makes."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from helpers import loader
from torch.utils.data import DataLoader

from lightning_autoprune import AutoPruneCallback, AutoPruneError
from lightning_autoprune.training.held_out.held_out_source import HeldOutSource, TrainSource
from lightning_autoprune.training.held_out.loader_sources import FixedSource, LoaderSource, ValidationSource
from lightning_autoprune.training.held_out.redrawn_source import RedrawnSource
from lightning_autoprune.training.held_out.sources import HELD_OUT_SOURCES, make_source


def test_the_words_with_a_source_are_those_of_the_callbacks_type():
    fraction, words, data_loader, default = get_args(get_type_hints(AutoPruneCallback.__init__)["held_out"])
    assert (fraction, data_loader, default) == (float, DataLoader, type(None))
    assert get_args(words) == tuple(HELD_OUT_SOURCES)


@pytest.mark.parametrize(
    ("held_out", "redraw", "kind", "description"),
    [
        ("val", True, ValidationSource, '"val", seed 3'),
        ("train", True, TrainSource, '"train"'),
        (0.25, True, RedrawnSource, "0.25 of each batch, seed 3"),
        (None, True, RedrawnSource, "0.25 of each batch, seed 3"),
        (None, False, FixedSource, "0.25 of the training set for the whole run, seed 3"),
        (0.25, False, FixedSource, "0.25 of the training set for the whole run, seed 3"),
        (loader(), True, LoaderSource, "a DataLoader, seed 3"),
    ],
    ids=["val", "train", "redrawn", "default", "fixed default", "fixed", "loader"],
)
def test_each_value_makes_its_source_with_the_description_that_checkpoints_have(held_out, redraw, kind, description):
    source = make_source(held_out, redraw, seed=3)
    assert type(source) is kind
    assert (source.description, source.seed) == (description, 3)
    assert source.has_batches == (kind is not TrainSource)
    assert source.default_train_gradients == (kind in (TrainSource, RedrawnSource))


def test_every_source_with_a_word_has_a_description():
    for kind in HELD_OUT_SOURCES.values():
        assert issubclass(kind, HeldOutSource)
        assert kind(0).description


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ("test", "`held_out` is 'test'; allowed are 'val', 'train'."),
        (
            1.0,
            '`held_out` is 1.0; it must be a number in (0, 1). `held_out` may also be "val", "train" or a DataLoader.',
        ),
        ([0.5], '`held_out` is [0.5]; it must be a number in (0, 1). `held_out` may also be "val", "train" or a'),
    ],
)
def test_any_other_value_is_refused(held_out, message):
    with pytest.raises(AutoPruneError) as error:
        make_source(held_out, True, seed=0)
    assert str(error.value).startswith(message)
