"""An object store whose calls are tried again while it does not answer, up to a limit.

It wraps any other. What counts as no answer is QuorumUnavailable (lost connections, truncated bodies, answers
such as 503 Slow Down or 429 Too Many Requests) and a request that takes too long; everything else passes through.
Before each new try comes a pause of random length, up to a bound that doubles ("full jitter": AWS Architecture
Blog, "Exponential Backoff And Jitter"), so that many clients do not come back at the same instant.

- Every call is idempotent, except `put` with if_absent: its first try may have stored the object and lost the
  answer. Where a later try is told that the object is there, it is read: the same bytes count as ours. Who must
  know that it alone was first puts something random into them.
- A listing that breaks goes on behind the last key that it gave.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from blockstore.errors import NotFound, QuorumUnavailable
from blockstore.units import KIB, MIB
from snapshotd.object_store import Data, ObjectInfo, ObjectStore, joined, size_of
from snapshotd.wrapped_store import WrappedStore

#: A body may take as long as at this rate: over a slower line snapshots would not ship in any useful time.
SLOWEST_BYTES_S: Final = 512 * KIB
#: The size of a whole object is not known before it is there; packs, the large ones, have about half of this.
_WHOLE_OBJECT_BYTES: Final = 32 * MIB
#: How much of a listing is asked for at once.
_LISTED_AT_ONCE: Final = 1000
#: The bound of the first pause, and of all later ones.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """request_s: of one try, to which its body adds. retries: after the first try. total_s: no try begins after it."""

    request_s: float = 30.0
    retries: int = 8
    total_s: float = 120.0


class Retrying(WrappedStore):
    """`inner`, with time limits and retries."""

    def __init__(
        self, inner: ObjectStore, limits: RetryLimits, *, chance: Callable[[float, float], float] = random.uniform
    ) -> None:
        super().__init__(inner)
        self._limits = limits
        self._chance = chance

    async def get(self, key: str) -> bytes:
        return await self._tried(lambda: self._inner.get(key), f"get {key}", _WHOLE_OBJECT_BYTES)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        return await self._tried(lambda: self._inner.get_range(key, start, length), f"get {key}", length)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        tries = 0

        async def attempt() -> bool:
            nonlocal tries
            tries += 1
            is_new = await self._inner.put(key, data, if_absent=if_absent)
            return is_new or (tries > 1 and await self._holds(key, data))

        return await self._tried(attempt, f"put {key}", size_of(data))

    async def delete(self, key: str) -> None:
        await self._tried(lambda: self._inner.delete(key), f"delete {key}", 0)

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        listing = _Listing(self._inner, prefix, after)
        try:
            while found := await self._tried(listing.next_some, f"list {prefix}", 0):
                for info in found:
                    yield info
        finally:
            await listing.close()

    async def _holds(self, key: str, data: Data) -> bool:
        try:
            return await self._inner.get(key) == joined(data)
        except NotFound:
            return False

    async def _tried(self, call: Callable[[], Awaitable[T]], what: str, size: int) -> T:
        """The result of the first try that gets an answer. size: of the body, in bytes."""
        began = time.monotonic()
        limit = self._limits.request_s + size / SLOWEST_BYTES_S
        ends = began + self._limits.total_s
        last: Exception
        for number in range(self._limits.retries + 1):
            try:
                async with asyncio.timeout(limit):
                    return await call()
            except TimeoutError as error:
                last, reason = error, f"no answer in {limit:.3g} s"
            except QuorumUnavailable as error:
                last, reason = error, str(error)
            pause = self._chance(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number))
            if number == self._limits.retries or time.monotonic() + pause >= ends:
                break
            await asyncio.sleep(pause)
        spent = time.monotonic() - began
        raise QuorumUnavailable(
            f"{self.url} does not answer: {what} was tried {number + 1} times in {spent:.1f} s, at last: {reason}"
        ) from last


class _Listing:
    """A listing in steps, each of which can be tried again."""

    def __init__(self, store: ObjectStore, prefix: str, after: str) -> None:
        self._store = store
        self._prefix = prefix
        self._last = after
        self._entries: AsyncIterator[ObjectInfo] | None = None

    async def next_some(self) -> Sequence[ObjectInfo]:
        """The next entries, none at the end. What a failed step had already found is found again by the next one."""
        if self._entries is None:
            self._entries = self._store.list(self._prefix, after=self._last)
        found: list[ObjectInfo] = []
        try:
            async for info in self._entries:
                found.append(info)
                if len(found) == _LISTED_AT_ONCE:
                    break
        except BaseException:
            await self.close()
            raise
        if found:
            self._last = found[-1].key
        return found

    async def close(self) -> None:
        if isinstance(self._entries, AsyncGenerator):
            await self._entries.aclose()
        self._entries = None
