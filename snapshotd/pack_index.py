"""Where each frame lies in the object store, as the index objects say, kept in memory.

Loaded at the first use, and again when somebody misses something: index objects that are new are read, those that
are gone are left out. One that cannot be read for good (Corrupt) is passed over and named in the error of
whoever looks for a frame in vain: what others say is not affected by it.

A listing is no picture of one instant: an index that takes the place of others may appear behind the place where the
listing is, while those others go ahead of it. Whoever writes it does so before it deletes them; so where
something was gone, one more listing, begun after that, has all.
"""

import asyncio
from collections.abc import Iterable
from contextlib import aclosing

import structlog

from blockstore.errors import Corrupt, NotFound
from snapshotd.ahead import ahead
from snapshotd.index import Frame, Index, IndexEntry, IndexMap, decode_index
from snapshotd.layout import INDEXES, PACKS, index_key, name_of_key
from snapshotd.references import bits_of
from snapshotd.repository import Repository

_log = structlog.get_logger(__name__)


class PackIndex:
    """The index objects of one repository. 13 bytes a frame: 65 MB for 1 TiB of packs."""

    def __init__(self, repository: Repository) -> None:
        self.map = IndexMap()
        self.damaged: dict[str, Corrupt] = {}
        """What is wrong with each index object that cannot be read, by name."""
        self._missing: frozenset[str] = frozenset()
        self._repository = repository
        self._indexes: dict[str, Index] = {}
        self._loaded = False
        self._refreshing: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """At the first call: read what is there."""
        if not self._loaded:
            await self.refresh()

    async def refresh(self) -> None:
        """Read what came, leave out what went. All that are asked for while a listing runs share the next one."""
        running = self._refreshing
        if running is not None and not running.done():
            await asyncio.wait({running})
        if self._refreshing is running:
            self._refreshing = asyncio.ensure_future(self._read_all())
        assert self._refreshing is not None
        await asyncio.shield(self._refreshing)

    def locate(self, pack: bytes, number: int) -> list[tuple[str, Frame]]:
        """(object name, frame) for each object that is said to hold it, as of the last refresh; mostly one."""
        found = []
        for entry in self.map.objects_of(pack):
            part = entry.part(pack)
            frame = part.find(number) if part else None
            if frame is not None:
                found.append((entry.object, frame))
        return found

    def holds(self, pack: bytes, number: int) -> bool:
        """Whether that frame is anywhere, as of the last refresh and the last listing of objects."""
        return any(name not in self._missing for name, _ in self.locate(pack, number))

    @property
    def lacks_something(self) -> bool:
        """Whether an object that an index names was not there when they were last listed, or an index is damaged."""
        return bool(self._missing or self.damaged)

    def present(self) -> list[IndexEntry]:
        """The entries whose objects were there when they were last listed."""
        return [entry for name, entry in self.map.entries.items() if name not in self._missing]

    async def list_objects(self) -> dict[str, int]:
        """Names and sizes of all objects of frames. What indexes name and is not among them counts as gone.

        An index that a late prune wrote may list what was deleted before, so only a listing that is younger than
        the index tells.
        """
        named = set(self.map.entries)
        listed = {name_of_key(info.key): info.size async for info in self._repository.store.list(PACKS)}
        self._missing = frozenset(named - listed.keys())
        return listed

    def note(self, name: str, index: Index) -> None:
        """An index object that this process has just stored."""
        self._indexes[name] = index
        self.map.add(index)

    async def _read_all(self) -> None:
        before = set(self._indexes)
        listed = await self._list()
        gone = await self._read(listed - self._indexes.keys() - self.damaged.keys())
        if gone or not before <= listed:
            known = await self._list()
            await self._read(known - self._indexes.keys() - self.damaged.keys())
            self._leave_out(before - listed - known)
            self.damaged = {name: error for name, error in self.damaged.items() if name in known}
        self._loaded = True

    async def _list(self) -> set[str]:
        return {name_of_key(info.key) async for info in self._repository.store.list(INDEXES)}

    async def _read(self, names: Iterable[str]) -> bool:
        """Add these; whether one of them was gone."""
        gone = False
        async with aclosing(ahead(self._read_one, sorted(names))) as read:
            async for name, index in read:
                if index is None:
                    gone = gone or name not in self.damaged
                else:
                    self.note(name, index)
        return gone

    async def _read_one(self, name: str) -> tuple[str, Index | None]:
        try:
            stored = await self._repository.store.get(index_key(name))
            return name, decode_index(self._repository.keys, name, stored)
        except NotFound:
            return name, None
        except Corrupt as error:
            _log.error("an index object is damaged; what only it says is lost", error=str(error))
            self.damaged[name] = error
            return name, None

    def _leave_out(self, gone: set[str]) -> None:
        """Forget what these index objects said."""
        for name in gone:
            del self._indexes[name]
        if gone:
            self.map = IndexMap(self._indexes.values())


def frames_by_pack(entries: Iterable[IndexEntry]) -> dict[bytes, int]:
    """Of each pack in `entries`, the frames that they hold, as bits."""
    frames: dict[bytes, int] = {}
    for entry in entries:
        for part in entry.parts:
            frames[part.pack] = frames.get(part.pack, 0) | bits_of(part.numbers)
    return frames
