"""Stand-ins for a user's object, and hooks in place of one of its methods."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from torch.utils.data import BatchSampler, SequentialSampler

from lightning_autoprune.training.held_out.overriding import MethodHook, override


class Meta(type):
    """A metaclass of the user's."""


class Words(metaclass=Meta):
    def __init__(self, text: str) -> None:
        self.text = text

    def __iter__(self):
        return iter(self.text.split())

    def count(self) -> int:
        return len(list(self))


class FixedWords(Words):
    def __setattr__(self, name, value):
        if name in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)


class Slotted:
    __slots__ = ("__dict__", "text")


class NeedsKeyword:
    def __init_subclass__(cls, keyword):
        super().__init_subclass__()


# Stand-ins


@pytest.mark.parametrize("kind", [Words, FixedWords])
def test_only_the_given_methods_are_others(kind):
    words = kind("one two")
    stand_in = override(words, __iter__=lambda: iter(["three"]))
    assert isinstance(stand_in, kind)
    assert (type(stand_in).__name__, type(stand_in).__module__) == (kind.__name__, __name__)
    assert (list(stand_in), stand_in.count(), stand_in.text) == (["three"], 1, "one two")
    assert (list(words), words.count(), type(words)) == (["one", "two"], 2, kind)


def test_attributes_are_shared_in_both_directions():
    words = Words("one two")
    stand_in = override(words, count=lambda: 0)
    stand_in.text, words.more = "four", 5
    assert (words.text, stand_in.more) == ("four", 5)
    del stand_in.more
    assert not hasattr(words, "more")


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_is_one_of_the_original(clone):
    stand_in = override(Words("one two"), __iter__=lambda: iter(["three"]))
    found = clone({"words": stand_in})["words"] if clone is not copy.copy else clone(stand_in)
    assert type(found) is Words
    assert (list(found), found is stand_in) == (["one", "two"], False)
    found.text = "five"
    assert stand_in.text == "one two"


def test_a_batch_sampler_keeps_its_length():
    sampler = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    stand_in = override(sampler, __iter__=lambda: iter([[0]]))
    assert (len(stand_in), list(stand_in), stand_in.batch_size) == (3, [[0]], 4)


@pytest.mark.parametrize("thing", [[1], (1,), {1: 2}, 5, Slotted(), NeedsKeyword(), iter([1]), (i for i in range(2))])
def test_there_is_no_stand_in_for_what_keeps_its_state_elsewhere(thing):
    assert override(thing, __iter__=lambda: iter(())) is None


# Hooks


class Owner:
    def double(self, x: int, add: int = 0) -> int:
        return 2 * x + add


def hook(owner: Owner, name: str = "double") -> MethodHook:
    return MethodHook(owner, name, lambda original, *args, **kwargs: -original(*args, **kwargs))


def test_a_hook_gets_the_original_method_and_the_arguments_until_it_is_removed():
    owner = Owner()
    found = hook(owner)
    assert (owner.double(3), owner.double(3, add=1)) == (-6, -7)
    found.remove()
    found.remove()
    assert owner.double(3) == 6
    assert vars(owner) == {}


def test_a_hook_that_another_one_has_replaced_is_left_alone():
    owner = Owner()
    found = hook(owner)
    other: Any = lambda x: x  # noqa: E731
    owner.double = other
    found.remove()
    assert owner.double is other


def test_a_method_that_the_user_had_set_comes_back():
    owner = Owner()
    own: Any = pickle.dumps
    owner.double = own
    found = hook(owner)
    assert pickle.loads(pickle.dumps(owner)).double is own
    found.remove()
    assert owner.double is own


def test_a_pickle_has_the_method_of_the_class():
    owner = Owner()
    found = hook(owner)
    clone, bound = pickle.loads(pickle.dumps((owner, found)))
    assert clone.double(3) == bound(3) == 6
    assert copy.deepcopy(owner).double(3) == 6
    assert owner.double(3) == -6
