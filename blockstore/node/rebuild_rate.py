"""How fast this node takes in copies of its peers' tables: at most so many bytes a second, all its replicas together.

The source is held back by it as well: it reads no further than its peer takes. Control says the rate when the node
registers and with each heartbeat; a node that cannot hear control goes on with the last one.
"""

import asyncio
import contextlib
from typing import Final

from blockstore.units import MIB

#: As control has it by default, until it is heard.
_UNTIL_TOLD_BYTES: Final = 64 * MIB
#: So much passes at once after a pause: an extent is never cut in two for a slow rate.
_BURST_S: Final = 0.25


class RebuildRate:
    """rate_bytes: a second, 0 without a limit."""

    def __init__(self) -> None:
        self.rate_bytes = _UNTIL_TOLD_BYTES
        self._free_at = 0.0
        self._changed = asyncio.Event()

    def set(self, rate_bytes: int) -> None:
        """From now on; who waits for the old one goes on."""
        if rate_bytes != self.rate_bytes:
            self.rate_bytes, self._free_at = rate_bytes, 0.0
            self._changed.set()
            self._changed = asyncio.Event()

    async def after(self, size_bytes: int) -> None:
        """So much was taken in: wait until more may be."""
        if not self.rate_bytes:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - _BURST_S) + size_bytes / self.rate_bytes
        changed = self._changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._free_at - now)):
                await changed.wait()
