"""The base of what wraps an object store: each call goes on to the inner one, until a subclass says otherwise."""

from collections.abc import AsyncIterator

from snapshotd.object_store import Data, ObjectInfo, ObjectStore


class WrappedStore:
    """`inner`, as it is."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def conditional_put(self) -> bool:
        return self._inner.conditional_put

    async def get(self, key: str) -> bytes:
        return await self._inner.get(key)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        return await self._inner.get_range(key, start, length)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        return await self._inner.put(key, data, if_absent=if_absent)

    async def delete(self, key: str) -> None:
        await self._inner.delete(key)

    def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        return self._inner.list(prefix, after=after)

    async def close(self) -> None:
        await self._inner.close()
