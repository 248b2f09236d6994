"""The checker of histories against one that tries every order, and on histories that are known to be right or wrong."""

import functools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.linearizable import INITIAL, UNKNOWN, NotLinearizable, Request, check_register


def write(value: int, sent: float, answered: float = UNKNOWN) -> Request:
    return Request(True, value, sent, answered)


def read(value: int, sent: float, answered: float) -> Request:
    return Request(False, value, sent, answered)


def explained_by_trying(history: list[Request]) -> bool:
    """Whether some order of the requests explains them: Wing and Gong's search, for short histories."""

    @functools.cache
    def search(done: frozenset[int], value: int) -> bool:
        left = [at for at in range(len(history)) if at not in done]
        if all(history[at].answered == UNKNOWN for at in left):
            return True
        first_answer = min(history[at].answered for at in left)
        for at in left:
            request = history[at]
            if request.sent > first_answer:
                continue  # somebody had his answer before this was sent
            if (request.is_write or request.value == value) and search(done | {at}, request.value):
                return True
        return False

    return search(frozenset(), INITIAL)


@st.composite
def histories(draw: st.DrawFn) -> list[Request]:
    """Up to seven requests; all times are different, as a clock that is fine enough makes them."""
    count = draw(st.integers(1, 7))
    instants = draw(st.permutations(range(2 * count)))
    history, written = [], 0
    for at in range(count):
        sent, answered = sorted(instants[2 * at : 2 * at + 2])
        if draw(st.booleans()):
            written += 1
            history.append(write(written, sent, UNKNOWN if draw(st.integers(0, 3)) == 0 else answered))
        else:
            history.append(read(draw(st.integers(0, 3)), sent, answered))
    return history


def accepted(history: list[Request]) -> bool:
    try:
        check_register(history)
    except NotLinearizable:
        return False
    return True


@settings(max_examples=1500)
@given(histories())
def test_it_says_what_trying_every_order_says(history: list[Request]) -> None:
    assert accepted(history) == explained_by_trying(history)


@pytest.mark.parametrize(
    "history",
    [
        [write(1, 0, 1), read(1, 2, 3)],
        [write(1, 0, 10), read(0, 1, 2), read(1, 3, 4)],
        [write(1, 0, 10), write(2, 0, 10), read(2, 1, 2), read(1, 3, 4)],
        [write(1, 0), read(0, 1, 2), read(0, 100, 101)],
        [write(1, 0), read(0, 1, 2), read(1, 100, 101), write(2, 102, 103), read(2, 104, 105)],
        [write(1, 0), write(2, 1, 2), read(2, 3, 4), read(1, 5, 6)],
        [write(1, 0, 1), Request(False, 7, 2, math.inf)],
    ],
    ids=["read back", "in flight", "two in flight", "never done", "done late", "done after a later one", "no answer"],
)
def test_what_can_happen_passes(history: list[Request]) -> None:
    check_register(history)


@pytest.mark.parametrize(
    "history",
    [
        [write(1, 0, 1), read(0, 2, 3)],
        [write(1, 0, 10), read(1, 1, 2), read(0, 3, 4)],
        [write(1, 0), read(1, 1, 2), read(0, 3, 4)],
        [write(1, 0, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
        [read(1, 0, 1), write(1, 2, 3)],
        [read(9, 0, 1)],
        [write(1, 0), write(2, 1, 2), read(2, 3, 4), read(1, 5, 6), read(2, 7, 8)],
    ],
    ids=["lost", "goes back", "goes back, unknown", "old again", "before it was sent", "invented", "to and fro"],
)
def test_what_cannot_happen_is_found(history: list[Request]) -> None:
    with pytest.raises(NotLinearizable):
        check_register(history)


def test_two_writes_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match="two writes of 1"):
        check_register([write(1, 0, 1), write(1, 2, 3)])
