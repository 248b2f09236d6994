"""At most so many bytes a second, for work that is done in steps."""

import asyncio
import contextlib
from typing import Final

#: So much passes at once after a pause, so that one step of a slow rate is not cut in two.
_BURST_S: Final = 0.25


class RateLimit:
    """rate_bytes: a second, 0 without a limit."""

    def __init__(self, rate_bytes: int = 0) -> None:
        self.rate_bytes = rate_bytes
        self._free_at = 0.0
        """Loop time at which all that was done until now is paid for."""
        self._changed = asyncio.Event()

    def set(self, rate_bytes: int) -> None:
        """From now on; who waits for the old one goes on."""
        if rate_bytes != self.rate_bytes:
            self.rate_bytes, self._free_at = rate_bytes, 0.0
            self._changed.set()
            self._changed = asyncio.Event()

    async def before(self, size_bytes: int) -> None:
        """So much is to be done: wait until what was done before is paid for."""
        if self.rate_bytes:
            await self._until(self._charge(size_bytes))

    async def after(self, size_bytes: int) -> None:
        """So much was done: wait until more may be."""
        if self.rate_bytes:
            self._charge(size_bytes)
            await self._until(self._free_at)

    def _charge(self, size_bytes: int) -> float:
        """When this begins to be paid for, in loop time."""
        begin = max(self._free_at, asyncio.get_running_loop().time() - _BURST_S)
        self._free_at = begin + size_bytes / self.rate_bytes
        return begin

    async def _until(self, time_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(time_s):
                await self._changed.wait()
