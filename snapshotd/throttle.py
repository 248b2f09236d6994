"""A bound on the bytes a second that go to an object store and come from it.

The bucket may be shared: all who take from one stay below its rate together, in the order in which they asked.
A request takes its tokens before it goes out, so a body leaves at the speed of the line and the pause comes
before the next one: the rate holds over a few bodies, not within one.
"""

import asyncio
import time
from typing import Final

from blockstore.errors import InvalidRequest
from snapshotd.object_store import Data, ObjectStore, size_of
from snapshotd.wrapped_store import WrappedStore

#: What was not used may be caught up: the bytes of this many seconds at most.
_BURST_S: Final = 0.25


class TokenBucket:
    """Hands out bytes at a rate. For one event loop."""

    def __init__(self, rate_bytes: float = 0) -> None:
        """rate_bytes: a second; 0 for no bound."""
        self._turn = asyncio.Lock()
        self._tokens = 0.0
        self._filled = time.monotonic()
        self._changed = asyncio.Event()
        self._rate = 0.0
        self.set_rate(rate_bytes)

    @property
    def rate_bytes(self) -> float:
        return self._rate

    def set_rate(self, rate_bytes: float) -> None:
        """Change the rate, also for those that wait; 0 for no bound. Raises InvalidRequest below 0."""
        if not 0 <= rate_bytes < float("inf"):
            raise InvalidRequest(f"{rate_bytes} bytes a second are no rate: it is 0 (no bound) or more")
        self._fill()
        self._rate = float(rate_bytes)
        if not self._rate:
            self._tokens = 0.0
        self._changed.set()

    async def take(self, count_bytes: int) -> None:
        """Wait for one's turn, and until what was taken before has been paid for; then take."""
        async with self._turn:
            while (wait_s := self._wait_s()) > 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.wait()
                except TimeoutError:
                    continue
            if self._rate:
                self._tokens -= count_bytes

    def _wait_s(self) -> float:
        self._fill()
        return -self._tokens / self._rate if self._rate else 0.0

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(self._tokens + (now - self._filled) * self._rate, self._rate * _BURST_S)
        self._filled = now


class Throttled(WrappedStore):
    """`inner`, with the bytes of `put` taken from one bucket and those of reads from another."""

    def __init__(self, inner: ObjectStore, *, up: TokenBucket | None = None, down: TokenBucket | None = None) -> None:
        """None: no bound in that direction."""
        super().__init__(inner)
        self._up = up or TokenBucket()
        self._down = down or TokenBucket()

    async def get(self, key: str) -> bytes:
        """The size is known only afterwards: whoever asks next waits for it."""
        await self._down.take(0)
        data = await self._inner.get(key)
        await self._down.take(len(data))
        return data

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        await self._down.take(length)
        return await self._inner.get_range(key, start, length)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        await self._up.take(size_of(data))
        return await self._inner.put(key, data, if_absent=if_absent)
