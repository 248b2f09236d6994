"""What a store is asked before anybody relies on it: whether we may use it, and what its conditional put is worth.

Everything is tried on objects of our own below `probe/`, under names that nobody else takes, and removed again.
"""

import asyncio
import secrets
from typing import Final

from blockstore.errors import Corrupt, InvalidRequest
from snapshotd.object_store import PROBE_FOLDER, ObjectStore

#: A server whose races have two winners one time in four passes 16 of them one time in a hundred.
_RACES: Final = 16
_RACERS: Final = 3


async def check_access(store: ObjectStore) -> None:
    """List, write, read and delete. Raises what the store says to it; Corrupt where it gives back something else."""
    async for _ in store.list(PROBE_FOLDER):
        break
    key, content = PROBE_FOLDER + secrets.token_hex(16), secrets.token_bytes(32)
    await store.put(key, content)
    try:
        if await store.get(key) != content or await store.get_range(key, 8, 16) != content[8:24]:
            raise Corrupt(f"{store.url} gives back other bytes than it was given: it is no use as an object store")
    finally:
        await store.delete(key)


async def has_one_winner(store: ObjectStore) -> bool:
    """Whether a put with if_absent, tried in races, always had exactly one winner. False where it is refused."""
    try:
        return all(await asyncio.gather(*(_race(store) for _ in range(_RACES))))
    except InvalidRequest:
        return False


async def _race(store: ObjectStore) -> bool:
    key = PROBE_FOLDER + secrets.token_hex(16)
    try:
        told = await asyncio.gather(
            *(store.put(key, secrets.token_bytes(16), if_absent=True) for _ in range(_RACERS)), return_exceptions=True
        )
        for answer in told:
            if isinstance(answer, BaseException):
                raise answer
        late = await store.put(key, b"late", if_absent=True)
        return told.count(True) == 1 and not late
    finally:
        await store.delete(key)
