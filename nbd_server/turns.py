"""Turns: how many requests the connections of one client begin before others have their turn.

All that is begun in one turn of the event loop is worked on before the next client's bytes are looked at. Without a
bound that was whatever all of a client's connections had sent, hundreds of requests of each, and who had a single one
waited for all of them.

Invariants: no more than TURN_REQUESTS of a client are begun in one turn of the loop, however many connections it has;
these go on in the order in which they came to wait, and who had some stands behind the others again.
"""

from collections.abc import Callable
from functools import partial

from nbd_server.limits import TURN_REQUESTS

CallSoon = Callable[[Callable[[], object]], object]


class Turns:
    """Those of one client. left: what its connections may still begin; they count it down."""

    __slots__ = ("_renewing", "_waiting", "left")

    def __init__(self) -> None:
        self.left = TURN_REQUESTS
        self._renewing = False
        self._waiting: dict[Callable[[], object], None] = {}

    def wait(self, go_on: Callable[[], object], call_soon: CallSoon) -> None:
        """Nothing is left: `go_on`, which begins what a connection has, is called once there is.

        call_soon: the event loop's.
        """
        assert not self.left
        self._waiting[go_on] = None
        if not self._renewing:
            self._renewing = True
            call_soon(partial(self._renew, call_soon))

    def _renew(self, call_soon: CallSoon) -> None:
        """The next turn."""
        self.left = TURN_REQUESTS
        for _ in range(len(self._waiting)):
            if not self.left:
                break
            first = next(iter(self._waiting))
            del self._waiting[first]
            first()
        self._renewing = bool(self._waiting)
        if self._renewing:
            call_soon(partial(self._renew, call_soon))
