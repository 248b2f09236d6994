"""The states of an attached device: the table holds its invariants along every path."""

import itertools

import pytest

from nbd_server.kernel.supervision import LATE, TRANSITIONS, Effect, Event, State, step

_ANSWERS = {
    Effect.PROBE: {Event.PROBE_PASSED, Event.PROBE_FAILED},
    Effect.LOCATE: {Event.LOCATED, Event.NOT_LOCATED, Event.TAKEN},
    Effect.OPEN: {Event.OPENED, Event.NOT_OPENED},
    Effect.WAIT: {Event.WAITED},
}
_SEEN_ANY_TIME = {Event.LINK_DEAD, Event.STALLED, Event.MOVED, Event.GONE}


def test_a_restart_and_a_move() -> None:
    state = State.SERVED
    done: list[Effect] = []
    for event in (
        Event.LINK_DEAD, Event.NOT_LOCATED, Event.WAITED, Event.LOCATED, Event.NOT_OPENED, Event.LINK_DEAD,
        Event.WAITED, Event.LOCATED, Event.OPENED,
    ):  # fmt: skip
        state, effects = step(state, event)
        done += effects
    assert state is State.SERVED
    assert done == [
        Effect.CUT, Effect.LOCATE, Effect.WAIT, Effect.LOCATE, Effect.OPEN, Effect.WAIT, Effect.LOCATE, Effect.OPEN
    ]  # fmt: skip


def test_a_hung_front_end_is_cut_off_before_another_one_is_looked_for() -> None:
    assert step(State.SERVED, Event.STALLED) == (State.ASKING, (Effect.PROBE,))
    assert step(State.ASKING, Event.PROBE_PASSED) == (State.SERVED, ())
    assert step(State.ASKING, Event.PROBE_FAILED) == (State.LOCATING, (Effect.CUT, Effect.LOCATE))


def test_every_path_of_events_that_can_come_is_in_the_table() -> None:
    """From each state that is reached, with what is under way there: any answer to it, and what is seen at any time."""
    reached, waiting = set(), [(State.SERVED, frozenset[Effect]()), (State.LOCATING, frozenset({Effect.LOCATE}))]
    while waiting:
        state, running = waiting.pop()
        if (state, running) in reached or state is State.ENDED:
            continue
        reached.add((state, running))
        for event in _SEEN_ANY_TIME.union(*(_ANSWERS[effect] for effect in running)):
            after, effects = step(state, event)
            begun = {effect for effect in effects if effect in _ANSWERS}
            # A question that is over is called off; its answer may be on its way.
            over = {Effect.PROBE} if after is not State.ASKING else set()
            still = {effect for effect in running if event not in _ANSWERS[effect]} - over
            assert not (begun & still), f"{begun} is begun twice: {state}, {event}"
            waiting.append((after, frozenset(begun | still)))
    assert {state for state, _ in reached} == set(State) - {State.ENDED}


def test_a_new_link_is_opened_only_where_control_says() -> None:
    opening = [event for (_, event), (_, effects) in TRANSITIONS.items() if Effect.OPEN in effects]
    assert opening == [Event.LOCATED]
    for (state, _), (after, effects) in TRANSITIONS.items():
        if state in (State.SERVED, State.ASKING) and after is State.LOCATING:
            assert effects[0] is Effect.CUT, "one link may live on where another one broke"


def test_nothing_leads_out_of_the_end_and_nothing_is_in_both_tables() -> None:
    for event in Event:
        assert step(State.ENDED, event) == (State.ENDED, ())
    assert not LATE & set(TRANSITIONS)
    impossible = set(itertools.product(State, Event)) - LATE - set(TRANSITIONS)
    state, event = next(iter(impossible))
    with pytest.raises(KeyError):
        step(state, event)
