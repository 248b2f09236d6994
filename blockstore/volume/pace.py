"""How fast the background goes: at most so many bytes a second, and behind the guest.

While guests want something, each step is followed by a pause as long as the step took, so that the background
has at most half of what the guest could have. The rate is set from outside, and told as it was of late.
"""

import asyncio
import contextlib
from collections import deque
from typing import Final

from blockstore.volume.guest_activity import GuestActivity

#: The rate now is that of so long.
_WINDOW_S: Final = 5.0
#: A limit lets so much pass at once, so that one step of a slow rate is not cut.
_BURST_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 1.0


class Pace:
    """rate_bytes: a second, 0 without a limit."""

    def __init__(self, activity: GuestActivity) -> None:
        self.rate_bytes = 0
        self._activity = activity
        self._loop = asyncio.get_running_loop()
        self._free_at = 0.0
        self._changed = asyncio.Event()
        self._done: deque[tuple[float, int]] = deque()

    def set_rate(self, rate_bytes: int) -> None:
        """From now on; who waits for the old one goes on."""
        if rate_bytes != self.rate_bytes:
            self.rate_bytes, self._free_at = rate_bytes, 0.0
            self._changed.set()
            self._changed = asyncio.Event()

    async def before(self, size_bytes: int) -> None:
        """Wait until so much may be done."""
        if not self.rate_bytes:
            return
        begin = max(self._free_at, self._loop.time() - _BURST_S)
        self._free_at = begin + size_bytes / self.rate_bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(begin - self._loop.time()):
                await self._changed.wait()

    async def after(self, size_bytes: int, took_s: float) -> None:
        """So much was done; give way where somebody waits."""
        now = self._loop.time()
        self._done.append((now, size_bytes))
        self._forget(now)
        if self._activity.busy:
            await asyncio.sleep(min(took_s, _LONGEST_PAUSE_S))

    @property
    def rate_now_bytes(self) -> int:
        """A second, over the last seconds."""
        self._forget(self._loop.time())
        return round(sum(size for _, size in self._done) / _WINDOW_S)

    def _forget(self, now: float) -> None:
        while self._done and self._done[0][0] < now - _WINDOW_S:
            self._done.popleft()
