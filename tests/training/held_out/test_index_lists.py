"""The index lists of one pass: recorded, drawn again, and split from then on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_autoprune.training.held_out.index_lists import IndexLists

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=8)


class Counter:
    """An iterator of lists with a state, as batch samplers of stateful loaders have."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == 3:
            raise StopIteration
        self.at += 1
        return [self.at]

    def state_dict(self):
        return {"at": self.at}


@given(lists=LISTS, ahead=st.integers(0, 8), given_out=st.integers(0, 8))
def test_lists_that_were_drawn_too_early_are_drawn_again_with_the_change(lists, ahead, given_out):
    ahead = min(ahead, len(lists))
    given_out = min(given_out, ahead)
    drawn = IndexLists(iter(lists))
    assert [next(drawn) for _ in range(ahead)] == drawn.recorded == lists[:ahead]
    drawn.change = lambda indices: ("changed", indices)
    drawn.draw_again(given_out)
    assert list(drawn) == [("changed", indices) for indices in lists[given_out:]]
    assert drawn.recorded == []


@given(lists=LISTS.filter(bool), ahead=st.integers(0, 8))
def test_a_look_at_the_first_list_draws_nothing(lists, ahead):
    drawn = IndexLists(iter(lists))
    first = [next(drawn) for _ in range(min(ahead, len(lists)))]
    assert drawn.peek() == drawn.peek() == lists[0]
    assert [*first, *drawn] == lists


def test_the_loader_gets_an_iterator_with_the_state_of_the_users():
    counter = Counter()
    lists = IndexLists(iter(counter))
    lists.change = lambda indices: [-i for i in indices]
    found = lists.as_iterator()
    assert isinstance(found, Counter)
    assert (next(found), found.state_dict()) == ([-1], {"at": 1})
    assert list(found) == [[-2], [-3]]


def test_a_plain_iterator_is_replaced():
    lists = IndexLists(iter([[1], [2]]))
    assert lists.as_iterator() is lists
