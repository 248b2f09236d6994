"""A socket that stands in where the kernel must have one, and nobody serves it: what comes is read and dropped.

A device with several links has one socket more than links, the first. While links are handed over one by one, the
kernel sends the requests of queues that have no link yet over the first socket that lives (Linux, drivers/block/nbd.c,
find_fallback). Were that a link, the queue would go by two links of one set, and the set would end
(nbd_server/links.py). So it is a stand-in, which ends when all links are there: what was lost with it is sent again
when its time is over, by the queue's own link. From then on the first queue, whose own socket is dead, goes by the
first link. The stand-in has to be read meanwhile: who waited to send over it would go on to the next socket when it
ends, instead of to its queue's own.
"""

import asyncio
import socket
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from blockstore.units import MIB

_BUFFER_BYTES: Final = MIB
#: Nothing has come for so long: those who had chosen it have sent.
_QUIET_S: Final = 0.01
#: Of a device whose first queue is busy something always comes.
_MOST_S: Final = 0.5


class StandIn:
    """One, inside its block. socket: what the kernel is given."""

    def __init__(self) -> None:
        self.socket, self._end = socket.socketpair()
        self._end.setblocking(False)
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._read_at = 0.0

    def __enter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._end, self._read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._end)
        self.end()
        for each in (self.socket, self._end):
            each.close()

    def end(self) -> None:
        """From now on it is a dead socket; the kernel may have it, or be given it."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    async def settle(self) -> None:
        """Until nothing comes any more, or for a moment."""
        loop = asyncio.get_running_loop()
        began = self._read_at = loop.time()
        while loop.time() - self._read_at < _QUIET_S and loop.time() - began < _MOST_S:  # noqa: ASYNC110 - until nothing
            await asyncio.sleep(_QUIET_S)

    def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with suppress(BlockingIOError):
            if not self._end.recv_into(self._buffer):
                loop.remove_reader(self._end)
            self._read_at = loop.time()
