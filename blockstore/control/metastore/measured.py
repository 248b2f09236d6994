"""A metastore whose calls are timed and counted; it wraps any other, and changes nothing."""

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Final

from blockstore.control.metastore.interface import Change, KeyValue, Listing, Metastore, Revision
from blockstore.errors import CairnError
from blockstore.metrics import Durations

OPERATIONS: Final = ("get", "list", "transact")


class StoreCalls:
    """What was asked of one metastore or several, one after the other."""

    def __init__(self) -> None:
        self.durations = {operation: Durations() for operation in OPERATIONS}
        """Also of what failed."""
        self.errors: Counter[str] = Counter()
        """By operation."""

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        except CairnError:
            self.errors[operation] += 1
            raise
        finally:
            self.durations[operation].add(perf_counter() - began)


class MeasuredMetastore:
    """`inner`, with its calls noted in `calls`."""

    def __init__(self, inner: Metastore, calls: StoreCalls) -> None:
        self._inner = inner
        self._calls = calls

    async def get(self, key: str) -> KeyValue | None:
        with self._calls.timed("get"):
            return await self._inner.get(key)

    async def list(self, prefix: str) -> Listing:
        with self._calls.timed("list"):
            return await self._inner.list(prefix)

    def as_of_now(self) -> AbstractContextManager[None]:
        return self._inner.as_of_now()

    async def transact(
        self,
        conditions: Mapping[str, Revision],
        puts: Mapping[str, bytes] | None = None,
        deletes: Iterable[str] = (),
    ) -> Revision | None:
        with self._calls.timed("transact"):
            return await self._inner.transact(conditions, puts, deletes)

    def watch(self, prefix: str, after: Revision) -> AsyncIterator[Change]:
        return self._inner.watch(prefix, after)

    async def close(self) -> None:
        await self._inner.close()
