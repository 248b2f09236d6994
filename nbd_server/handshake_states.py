"""The handshake's states, and what moves them: a client may do what stands in `TRANSITIONS`. Pure.

A client that breaks the protocol ends in CLOSED: what there is to send is sent, and then the connection is dropped
(NBD, "Termination of the session during option haggling").
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final


class State(Enum):
    """Where the handshake is."""

    CLIENT_FLAGS = auto()
    """Waits for the client's flags."""
    OPTION_HEADER = auto()
    """Waits for the header of an option."""
    OPTION_DATA = auto()
    """Waits for the data of an option."""
    SKIPPING = auto()
    """Drops the data of an option that is refused for its length."""
    LOOKING_UP = auto()
    """An option waits for what the server has to ask elsewhere; nothing that the client sends is looked at."""
    STARTING_TLS = auto()
    """The next byte that the client sends is TLS; it is shown to nobody here until that is established."""
    TRANSMISSION = auto()
    """The client has chosen an export."""
    CLOSED = auto()
    """Send what is there, then drop the connection."""


class Step(Enum):
    """What moves the state."""

    FLAGS_ACCEPTED = auto()
    OPTION_BEGUN = auto()
    OPTION_TOO_LONG = auto()
    LOOK_UP_BEGUN = auto()
    OPTION_ANSWERED = auto()
    TLS_AGREED = auto()
    TLS_STARTED = auto()
    EXPORT_CHOSEN = auto()
    ENDED = auto()


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.CLIENT_FLAGS: {Step.FLAGS_ACCEPTED: State.OPTION_HEADER, Step.ENDED: State.CLOSED},
    State.OPTION_HEADER: {
        Step.OPTION_BEGUN: State.OPTION_DATA,
        Step.OPTION_TOO_LONG: State.SKIPPING,
        Step.ENDED: State.CLOSED,
    },
    State.OPTION_DATA: {
        Step.OPTION_ANSWERED: State.OPTION_HEADER,
        Step.LOOK_UP_BEGUN: State.LOOKING_UP,
        Step.TLS_AGREED: State.STARTING_TLS,
        Step.EXPORT_CHOSEN: State.TRANSMISSION,
        Step.ENDED: State.CLOSED,
    },
    State.LOOKING_UP: {
        Step.OPTION_ANSWERED: State.OPTION_HEADER,
        Step.EXPORT_CHOSEN: State.TRANSMISSION,
        Step.ENDED: State.CLOSED,
    },
    State.SKIPPING: {Step.OPTION_ANSWERED: State.OPTION_HEADER, Step.ENDED: State.CLOSED},
    State.STARTING_TLS: {Step.TLS_STARTED: State.OPTION_HEADER, Step.ENDED: State.CLOSED},
    State.TRANSMISSION: {},
    State.CLOSED: {},
}
