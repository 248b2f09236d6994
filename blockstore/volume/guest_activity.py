"""Whether guests want something now: what runs in the background gives way to them."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

#: A guest that waits for each answer has nothing in flight in between.
_PAUSE_S: Final = 0.05


class GuestActivity:
    """Of one volume, and of all others of this process: they share its processor, and the nodes'.

    anybody: whether requests of any guest are in flight now.
    """

    def __init__(self, anybody: Callable[[], bool] = lambda: False) -> None:
        self._anybody = anybody
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._ended_at = float("-inf")

    @property
    def busy(self) -> bool:
        """Requests are in flight, or (of this volume) were a moment ago."""
        return self._in_flight > 0 or self._loop.time() - self._ended_at < _PAUSE_S or self._anybody()

    def note(self, request: "asyncio.Future[Any]") -> None:
        """A guest's request, until it ends."""
        self._in_flight += 1
        request.add_done_callback(self._ended)

    def _ended(self, request: "asyncio.Future[Any]") -> None:
        self._in_flight -= 1
        self._ended_at = self._loop.time()
