"""How fast the background goes: at most so many bytes a second, and behind the guest.

While guests want something, each step is followed by a pause as long as the step took, so that the background
has at most half of what the guest could have. The rate is set from outside, and told as it was of late.
"""

import asyncio
from collections import deque
from typing import Final

from blockstore.rate_limit import RateLimit
from blockstore.volume.guest_activity import GuestActivity

#: The rate now is that of so long.
_WINDOW_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 1.0


class Pace:
    """limit: as it is set."""

    def __init__(self, activity: GuestActivity) -> None:
        self.limit = RateLimit()
        self._activity = activity
        self._loop = asyncio.get_running_loop()
        self._done: deque[tuple[float, int]] = deque()

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
