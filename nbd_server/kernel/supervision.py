"""The states of an attached device, and what moves them: one table. Pure; the loop around it is `supervisor`.

    served ── a link breaks, or the volume has moved ──> locating ── control says where ──> opening ──> served
    served ── requests stand still ──> asking ── the front-end answers ──> served
                                       asking ── it does not ──> locating (the link is cut)
    locating, opening ── not now ──> waiting ── a moment later ──> locating

Invariants: a new link is opened only after control was asked where the volume is, so that an old front-end is not
gone back to; before any state in which the kernel may get another socket, all links that it has are cut; a device that
somebody else disconnected, or a volume that belongs to another client, ends it, and nothing leads out of that.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final


class State(Enum):
    """Where a device is."""

    SERVED = "served"
    ASKING = "asking the front-end whether it is well"
    LOCATING = "asking control where the volume is"
    OPENING = "connecting to the front-end"
    WAITING = "waiting for a front-end"
    ENDED = "ended"


class Event(Enum):
    """What happens to it."""

    LINK_DEAD = auto()
    """One of its sockets has died."""
    STALLED = auto()
    """Requests are in flight, and none was completed for a while."""
    PROBE_PASSED = auto()
    PROBE_FAILED = auto()
    MOVED = auto()
    """Control says that it is served elsewhere."""
    LOCATED = auto()
    NOT_LOCATED = auto()
    OPENED = auto()
    """The kernel has new sockets."""
    NOT_OPENED = auto()
    WAITED = auto()
    GONE = auto()
    """The device was disconnected, or is somebody else's."""
    TAKEN = auto()
    """The volume is another client's, or is no more."""


class Effect(Enum):
    """What is to be done, in this order; each but CUT and STOP ends in an event."""

    PROBE = auto()
    CUT = auto()
    """End the links that the kernel has."""
    LOCATE = auto()
    OPEN = auto()
    WAIT = auto()
    STOP = auto()


Step = tuple[State, tuple[Effect, ...]]

_CUT_OFF: Final = (State.LOCATING, (Effect.CUT, Effect.LOCATE))
_BUSY: Final = (State.LOCATING, State.OPENING, State.WAITING)

#: The machine: state and event, then the state after it and what is to be done.
TRANSITIONS: Final[Mapping[tuple[State, Event], Step]] = {
    (State.SERVED, Event.LINK_DEAD): _CUT_OFF,
    (State.SERVED, Event.MOVED): _CUT_OFF,
    (State.SERVED, Event.STALLED): (State.ASKING, (Effect.PROBE,)),
    (State.ASKING, Event.PROBE_PASSED): (State.SERVED, ()),
    (State.ASKING, Event.PROBE_FAILED): _CUT_OFF,
    (State.ASKING, Event.LINK_DEAD): _CUT_OFF,
    (State.ASKING, Event.MOVED): _CUT_OFF,
    (State.LOCATING, Event.LOCATED): (State.OPENING, (Effect.OPEN,)),
    (State.LOCATING, Event.NOT_LOCATED): (State.WAITING, (Effect.WAIT,)),
    (State.LOCATING, Event.TAKEN): (State.ENDED, (Effect.CUT, Effect.STOP)),
    (State.OPENING, Event.OPENED): (State.SERVED, ()),
    (State.OPENING, Event.NOT_OPENED): (State.WAITING, (Effect.WAIT,)),
    (State.WAITING, Event.WAITED): (State.LOCATING, (Effect.LOCATE,)),
    **{(state, Event.GONE): (State.ENDED, (Effect.STOP,)) for state in State if state is not State.ENDED},
}

#: What comes late and changes nothing: word of the old link while a new one is made, and answers to what is over.
LATE: Final = frozenset(
    {
        *((state, event) for state in _BUSY for event in (Event.LINK_DEAD, Event.STALLED, Event.MOVED)),
        *((state, event) for state in (*_BUSY, State.SERVED) for event in (Event.PROBE_PASSED, Event.PROBE_FAILED)),
        (State.ASKING, Event.STALLED),
        *((State.ENDED, event) for event in Event),
    }
)


def step(state: State, event: Event) -> Step:
    """The state after `event`, and what is to be done. Raises KeyError for what cannot happen there."""
    if (state, event) in LATE:
        return state, ()
    return TRANSITIONS[state, event]
