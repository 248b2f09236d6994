"""What the tests of repositories share: a store that crashes, and short ways to make and open one."""

from typing import Any

from snapshotd import repository_objects
from snapshotd.keyring import Keyring
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data, ObjectStore
from snapshotd.passphrase_keyring import Cost
from snapshotd.repository import Repository, open_repository

CHEAP = Cost(log2_n=10, r=8, p=1)


class Crash(Exception):
    """The process is gone at this point."""


class CrashingStore(MemoryStore):
    """Goes down before the change with this number (0, 1, ...), or right after it. changes: so far."""

    def __init__(self, objects: dict[str, bytes], at: int, *, after: bool) -> None:
        super().__init__()
        self._objects = objects
        self._at = at
        self._after = after
        self.changes = 0

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        self._count(before=True)
        is_new = await super().put(key, data, if_absent=if_absent)
        self._count(before=False)
        return is_new

    async def delete(self, key: str) -> None:
        self._count(before=True)
        await super().delete(key)
        self._count(before=False)

    def _count(self, *, before: bool) -> None:
        if self.changes == self._at and before != self._after:
            raise Crash
        if not before:
            self.changes += 1


def copy_of(store: MemoryStore) -> dict[str, bytes]:
    return dict(store._objects)


async def made(store: ObjectStore, keyring: Keyring) -> Repository:
    return await open_repository(store, keyring, "cl-1", create=True)


async def opened(store: ObjectStore, keyring: Keyring) -> Repository:
    return await open_repository(store, keyring, "cl-1", create=False)


async def keys_in(store: ObjectStore) -> list[str]:
    return [info.key async for info in store.list("keys")]


def sealed(members: dict[str, Any]) -> bytes:
    """A clear object with these members, whose checksum is right."""
    kind = members.pop("format")
    members.pop("version")
    return repository_objects._encode(kind, members)
