"""An object store whose requests are timed and counted, each try by itself; it wraps any other, and changes nothing.

It stands below the retries (snapshotd.retrying), so that it tells what the store did, not what became of it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final

from blockstore.errors import CairnError, Corrupt, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from blockstore.metrics import Durations
from snapshotd.object_store import Data, ObjectInfo, ObjectStore, size_of
from snapshotd.wrapped_store import WrappedStore

OPERATIONS: Final = ("get", "get-range", "put", "delete", "list")
OK: Final = "ok"
#: It took too long, or who asked has gone.
CUT_OFF: Final = "cut-off"
_FAILED: Final = "failed"
_OUTCOMES: Final[dict[type[CairnError], str]] = {
    NotFound: "not-found",
    QuorumUnavailable: "unavailable",
    NoSpace: "no-space",
    InvalidRequest: "refused",
    Corrupt: "corrupt",
}
OUTCOMES: Final = (OK, *_OUTCOMES.values(), CUT_OFF, _FAILED)


class StoreRequests:
    """What was asked of one store. A listing counts once, and takes until its end."""

    def __init__(self) -> None:
        self.ended: Counter[tuple[str, str]] = Counter()
        """By operation and outcome."""
        self.durations = {operation: Durations() for operation in OPERATIONS}
        self.sent_bytes = 0
        self.received_bytes = 0

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        began, outcome = perf_counter(), _FAILED
        try:
            yield
            outcome = OK
        except CairnError as error:
            outcome = next((name for kind, name in _OUTCOMES.items() if isinstance(error, kind)), _FAILED)
            raise
        except asyncio.CancelledError:
            outcome = CUT_OFF
            raise
        except GeneratorExit:  # of a listing whose rest nobody wants
            outcome = OK
            raise
        finally:
            self.ended[operation, outcome] += 1
            self.durations[operation].add(perf_counter() - began)


class MeasuredStore(WrappedStore):
    """`inner`, with its requests noted in `requests`."""

    def __init__(self, inner: ObjectStore, requests: StoreRequests) -> None:
        super().__init__(inner)
        self._requests = requests

    async def get(self, key: str) -> bytes:
        with self._requests.timed("get"):
            data = await self._inner.get(key)
        self._requests.received_bytes += len(data)
        return data

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        with self._requests.timed("get-range"):
            data = await self._inner.get_range(key, start, length)
        self._requests.received_bytes += len(data)
        return data

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        with self._requests.timed("put"):
            is_new = await self._inner.put(key, data, if_absent=if_absent)
        self._requests.sent_bytes += size_of(data)
        return is_new

    async def delete(self, key: str) -> None:
        with self._requests.timed("delete"):
            await self._inner.delete(key)

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        entries = self._inner.list(prefix, after=after)
        with self._requests.timed("list"):
            try:
                async for each in entries:
                    yield each
            finally:
                if isinstance(entries, AsyncGenerator):
                    await entries.aclose()
