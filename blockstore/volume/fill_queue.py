"""Fills on their way into the log, a few at a time and behind the guest.

What a guest's read brought is offered: where too much waits already it is dropped, which costs nothing but
another fetch. The background pass waits for its turn instead. Few bytes are in the log's queue at once,
because the guest's writes stand in line behind them. Invariant: once closed nothing is filled any more, for
no fill may follow the record that says "hydrated".
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from blockstore.errors import CairnError
from blockstore.units import BLOCK_SIZE, KIB, MIB

#: Of what guests' reads brought, and the background pass has in hand.
_WAITING_BYTES: Final = 16 * MIB
#: In the log's queue: four records; one window where a guest is busy, whose write waits for no more than that then:
#: what is longer is divided.
_IN_FLIGHT_BYTES: Final = 4 * MIB
_BUSY_IN_FLIGHT_BYTES: Final = 256 * KIB


class Fills(Protocol):
    """What submits a fill: the open volume."""

    def fill(self, start: int, data: bytes | memoryview) -> "asyncio.Future[None]": ...


class FillQueue:
    """filled: told of each range that is there now. busy: whether guests have requests in flight."""

    def __init__(self, volume: Fills, filled: Callable[[int, int], None], busy: Callable[[], bool]) -> None:
        self.trouble: CairnError | None = None
        """Why a fill failed, the last that did."""
        self.filled_blocks = 0
        self._volume = volume
        self._filled = filled
        self._busy = busy
        self._waiting: deque[tuple[int, memoryview]] = deque()
        self._waiting_bytes = self._in_flight_bytes = 0
        self._closed = False
        self._less = asyncio.Event()

    def offer(self, start: int, data: memoryview) -> None:
        """Fill these blocks from `start` on, at most 1 MiB, unless there is too much to do."""
        if not self._closed and self._waiting_bytes < _WAITING_BYTES:
            self._take(start, data)

    async def put(self, start: int, data: memoryview) -> None:
        """The same, once there is room."""
        await self.room()
        if not self._closed:
            self._take(start, data)

    async def room(self) -> None:
        """Done once what is offered is taken, or it is closed."""
        while self._waiting_bytes >= _WAITING_BYTES:
            await self._wait_for_less()

    @property
    def closed(self) -> bool:
        """Nothing is filled any more."""
        return self._closed

    async def idle(self) -> None:
        """Done once nothing waits and nothing is in flight."""
        while self._waiting_bytes or self._in_flight_bytes:
            await self._wait_for_less()

    def close(self) -> None:
        """Fill nothing more; what is in the log stays there."""
        self._closed = True
        self._waiting.clear()
        self._waiting_bytes = 0
        self._less.set()

    async def _wait_for_less(self) -> None:
        self._less.clear()
        await self._less.wait()

    def _take(self, start: int, data: memoryview) -> None:
        self._waiting.append((start, data))
        self._waiting_bytes += len(data)
        self._submit()

    def _submit(self) -> None:
        busy = self._busy()
        while self._waiting and self._in_flight_bytes < (_BUSY_IN_FLIGHT_BYTES if busy else _IN_FLIGHT_BYTES):
            start, data = self._waiting.popleft()
            if busy and len(data) > _BUSY_IN_FLIGHT_BYTES:
                data, rest = data[:_BUSY_IN_FLIGHT_BYTES], data[_BUSY_IN_FLIGHT_BYTES:]
                self._waiting.appendleft((start + len(data) // BLOCK_SIZE, rest))
            self._waiting_bytes -= len(data)
            self._in_flight_bytes += len(data)
            self._volume.fill(start, data).add_done_callback(partial(self._ended, start, len(data)))

    def _ended(self, start: int, size_bytes: int, future: "asyncio.Future[None]") -> None:
        self._in_flight_bytes -= size_bytes
        error = future.exception()
        if error is None:
            self.filled_blocks += size_bytes // BLOCK_SIZE
            self._filled(start, size_bytes // BLOCK_SIZE)
        elif isinstance(error, CairnError):
            self.trouble = error  # the next pass over what is missing comes by again
        else:
            raise error
        self._submit()
        self._less.set()
