"""Every bound that the server puts on its clients, with its reason."""

from dataclasses import dataclass
from typing import Final

from blockstore.config import FrontEndSettings
from blockstore.units import KIB, MIB
from nbd_server.transmission import MAX_REQUEST_BYTES

#: That all connections of one client begin in one turn of the event loop (nbd_server/turns.py): about a millisecond's
#: work, for which others wait. The kernel's client has 128 in flight, and fewer arrive at once.
TURN_REQUESTS: Final = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take, and all together.

    The server's memory for its clients: `total_bytes` at most, and for each connection `own_bytes`,
    `unsent_bytes` and a receive buffer of 128 KiB; with the values below 256 MiB and 224 MiB for
    256 clients that all do their worst. TLS takes up to 512 KiB more of each.
    """

    connections: int = 256
    """Of all clients; beyond it the oldest that is still in its handshake gives way, else the newcomer."""
    connections_per_client: int = 128
    """Of one address over TCP: the same among these, so that nobody's connections are in the way of others'."""
    in_flight_requests: int = 512
    """Of one connection. The kernel keeps 128 by default, and fio rarely more."""
    in_flight_bytes: int = 32 * MIB
    """Of one connection: payloads of writes, and results at most. The next request waits once it is reached."""
    link_bytes: int = 8 * MIB
    """The same, of a link that has others beside it (nbd_server/links.py): its kernel sends again what is not answered
    in time, and what has begun by then is done twice."""
    total_bytes: int = 256 * MIB
    """The same, of all connections: eight clients get all that one may have, more of them share."""
    client_bytes: int = 128 * MIB
    """The same, of all connections of one address over TCP: half is left for others, however many it opens."""
    own_bytes: int = 256 * KIB
    """A connection may have this in any case: small requests go on while others hold the total."""
    unsent_bytes: int = 512 * KIB
    """Replies in the socket's queue beyond which no request of the client is begun until it has read them."""
    handshake_s: float = 30.0
    """From the connection to the transmission phase, TLS included; a person at an interactive client still makes it."""
    tls_end_s: float = 2.0
    """For a client's word that it has heard the end of TLS, before its connection is closed without that."""
    stalled_s: float = 30.0
    """Who has sent part of a payload, or left replies unread, must go on within this, or at most twice this,
    and is dropped else: it holds memory. The longest payload makes it at 1 MiB/s. An idle client holds none."""
    drain_s: float = 30.0
    """From the end of a connection to its being dropped: longer than a request waits for a quorum."""
    farewell_s: float = 0.2
    """When the server ends and all that a client had in flight is answered: for what it sends still, which is
    refused. A round trip, in which its requests arrive and it learns of it."""

    def __post_init__(self) -> None:
        assert min(self.total_bytes, self.client_bytes) >= MAX_REQUEST_BYTES, "the longest request has to fit"


def limits_of(settings: FrontEndSettings) -> Limits:
    """Those that may be set."""
    return Limits(
        connections=settings.max_connections,
        connections_per_client=settings.max_connections_per_client,
        client_bytes=settings.max_in_flight_per_client_bytes,
        total_bytes=settings.max_in_flight_bytes,
        handshake_s=settings.handshake_s,
        drain_s=settings.drain_s,
    )
