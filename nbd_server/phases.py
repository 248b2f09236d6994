"""Where a connection is, and where it may go from there. Pure.

What is not in the table raises (nbd_server/connection.py).
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final


class Phase(Enum):
    """Where a connection is."""

    HANDSHAKE = auto()
    STARTING_TLS = auto()
    """The transport is being replaced; what comes is kept for the handshake, which goes on under TLS."""
    TRANSMISSION = auto()
    REFUSING = auto()
    """The server ends: new requests are answered with ESHUTDOWN, for a moment after those in flight are answered."""
    DRAINING = auto()
    """Takes no more requests; ends when those in flight are answered."""
    CLOSED = auto()


PHASES: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.HANDSHAKE: frozenset({Phase.STARTING_TLS, Phase.TRANSMISSION, Phase.DRAINING, Phase.CLOSED}),
    Phase.STARTING_TLS: frozenset({Phase.HANDSHAKE, Phase.CLOSED}),
    Phase.TRANSMISSION: frozenset({Phase.REFUSING, Phase.DRAINING, Phase.CLOSED}),
    Phase.REFUSING: frozenset({Phase.DRAINING, Phase.CLOSED}),
    Phase.DRAINING: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}
