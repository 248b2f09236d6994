"""Every bound that the server puts on its clients, with its reason."""

from dataclasses import dataclass

from blockstore.units import MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take, and all together.

    Memory that a client can hold: the requests in flight, with one more that is being received and the
    replies it has not fetched, so at most about three times `in_flight_bytes`.
    """

    connections: int = 256
    """Of all clients; beyond it the oldest that is still in its handshake gives way, else the newcomer."""
    in_flight_requests: int = 512
    """Of one connection. The kernel keeps 128 by default, and fio rarely more."""
    in_flight_bytes: int = 32 * MIB
    """Of one connection: payloads of writes and results of reads. The next request waits once it is reached."""
    handshake_s: float = 30.0
    """From the connection to the transmission phase; a person at an interactive client still makes it."""
    drain_s: float = 30.0
    """From the end of a connection to its being dropped: longer than a request waits for a quorum."""
    unsent_bytes: int = MIB
    """Replies waiting in the socket's queue from which on no further request of the client is begun."""
