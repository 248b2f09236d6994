"""How fast replicas are read while guests use the same nodes: one call at a time, and then a pause.

What is shipped is hashed, compressed and encrypted, which takes the processor as long as the reading took and more.
On a machine that has guests' processes, too, they would wait behind all of it. So each call is small there, and
followed by a pause that is some times as long as the call. A node's answer says whether guests want something of it;
where none do, nothing waits.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from blockstore.units import EXTENT_BLOCKS

#: The pause behind a call, in times of the call.
_PAUSES: Final = 8.0
#: In one call beside guests: its hashes and its one frame keep a processor for some 2 ms, of 256 blocks for 8.
_BUSY_BLOCKS: Final = 64
#: A call that waited for a slow disk says little of the processor.
_LONGEST_PAUSE_S: Final = 0.1

Result = TypeVar("Result")


class GuestPace:
    """Of all that a process reads: what it takes adds up."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._busy = False
        self._free_at = 0.0

    def note(self, *, busy: bool) -> None:
        """What the last answer said of guests."""
        self._busy = busy

    def blocks(self) -> int:
        """That the next call should read."""
        return _BUSY_BLOCKS if self._busy else EXTENT_BLOCKS

    async def read(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """The call's result, once it is its turn."""
        if not self._busy:
            return await call()
        async with self._turn:
            await asyncio.sleep(self._free_at - self._loop.time())
            began = self._loop.time()
            result = await call()
            took_s = self._loop.time() - began
            self._free_at = began + took_s + min(_PAUSES * took_s, _LONGEST_PAUSE_S)
            return result
