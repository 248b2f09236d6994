"""An object store in this process's memory: for tests, and for trying things out."""

from collections.abc import AsyncIterator

from blockstore.errors import Corrupt, NotFound
from snapshotd.object_store import Data, ObjectInfo, check_folder, check_key, check_range, joined


class MemoryStore:
    """Objects in a dictionary. Nothing in here awaits, so every call is atomic."""

    def __init__(self) -> None:
        self.url = "memory://"
        self.conditional_put = True
        self._objects: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise NotFound(f"no object {key} in {self.url}") from None

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        whole = await self.get(key)
        if start + length > len(whole):
            raise Corrupt(f"{key} in {self.url} ends at byte {len(whole)}: {length} bytes from {start} are not there")
        return whole[start : start + length]

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        if check_key(key) in self._objects and if_absent:
            return False
        self._objects[key] = bytes(joined(data))
        return True

    async def delete(self, key: str) -> None:
        self._objects.pop(check_key(key), None)

    async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
        folder = check_folder(prefix)
        for key in sorted(self._objects):
            if key.startswith(folder) and key > after and key in self._objects:
                yield ObjectInfo(key, len(self._objects[key]))

    async def close(self) -> None:
        """Nothing to let go of: the objects stay while somebody holds the store."""
