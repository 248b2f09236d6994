"""What all snapshots that are being written share: places for packs, the index of new ones, and the hashes.

A pack that is not stored and indexed yet may be referred to already, by the snapshot that it is made for and by
others that have blocks in common with it; `indexed` is what they wait for before anything that names it is
written. Index objects gather some packs each. Bounded: packs in memory (open or being uploaded), and packs
without an index.

Packs that a process stored before it died, and did not index, are found by `look`: their trailers say for which
snapshot they were made, and they are taken over by whoever ships that one, and by nobody else (a prune spares the
packs of snapshots that are pending, so nothing in their way deletes them).
"""

import asyncio
import os
import secrets
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final, Protocol, TypeVar

import structlog

from blockstore.errors import CairnError, Corrupt, NotFound, QuorumUnavailable
from snapshotd.ahead import ahead
from snapshotd.background import background_threads
from snapshotd.crypto import SALT_SIZE
from snapshotd.dedupe import Dedupe, Hashes
from snapshotd.index import MAX_INDEX_ENTRIES, Index, IndexEntry, encode_index
from snapshotd.inventory import load_trailer
from snapshotd.layout import index_key
from snapshotd.object_store import ObjectInfo
from snapshotd.pack import Trailer
from snapshotd.pack_index import PackIndex, frames_by_pack
from snapshotd.repository import Repository

_log = structlog.get_logger(__name__)

#: Packs in one index object, unless somebody waits for one of them.
_INDEX_AT: Final = 16

Result = TypeVar("Result")


class OpenPack(Protocol):
    """A pack on its way, as its maker offers it."""

    @property
    def stored(self) -> "asyncio.Future[None]":
        """Done when its object is in the store."""
        ...

    def close(self) -> None:
        """Take no more blocks, store what is there: somebody waits."""
        ...


class PackStore:
    """Of one repository and one process. uploads: at once; level: of zstd."""

    def __init__(self, repository: Repository, index: PackIndex, dedupe: Dedupe, uploads: int, level: int) -> None:
        self.repository = repository
        self.index = index
        self.dedupe = dedupe
        self.level = level
        self.uploading = asyncio.Semaphore(uploads)
        self._places = uploads + 2
        self._taken = 0
        self._place_free = asyncio.Condition()
        self._on_way: dict[bytes, OpenPack] = {}
        self._unindexed: dict[bytes, tuple[IndexEntry, Hashes]] = {}
        self._orphans: dict[str, frozenset[str]] = {}
        """Objects that no index names, and the snapshots that they were made for."""
        self._indexing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._hashes: asyncio.Task[None] | None = None
        """The last writing of hashes that nobody waited for."""
        self._threads = background_threads(os.cpu_count() or 1, "pack")
        self._file_thread = background_threads(1, "hashes")

    async def in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Work that lets the interpreter's lock go: as many at once as there are processors."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def hold(self, frames: Mapping[bytes, Iterable[int]], quarantined: Container[bytes]) -> bool:
        """Whether all these frames (numbers by pack) are stored, and nobody means to delete one."""
        return all(
            pack not in quarantined and all(self.index.holds(pack, number) for number in numbers)
            for pack, numbers in frames.items()
        )

    # ---- packs on their way

    async def wait_for_place(self) -> None:
        """Until one more pack may be held in memory."""
        if self._taken >= self._places:
            async with self._place_free:
                await self._place_free.wait_for(lambda: self._taken < self._places)

    def begin(self, pack: bytes, maker: OpenPack) -> None:
        """A pack is being filled; `finish` must follow."""
        self._taken += 1
        self._on_way[pack] = maker

    async def finish(self, pack: bytes, stored: tuple[IndexEntry, Hashes] | None) -> None:
        """Its object is in the store, or (None) will not be."""
        self._taken -= 1
        del self._on_way[pack]
        if stored is not None:
            self._unindexed[pack] = stored
        async with self._place_free:
            self._place_free.notify_all()
        if len(self._unindexed) >= _INDEX_AT:
            await self.write_index()

    async def indexed(self, frames: Mapping[bytes, Iterable[int]]) -> None:
        """Return once each of these frames (numbers by pack) is stored and some index object says where.

        Those long stored are fine. Raises QuorumUnavailable where a pack was given up by whoever made it, or where one
        of the frames is gone: a pack that was repacked has lost what nobody needed.
        """
        packs = frames.keys()
        waited = [self._on_way[pack] for pack in packs & self._on_way.keys()]
        for each in waited:
            each.close()
        if waited:
            await asyncio.wait({each.stored for each in waited})
        if packs & self._unindexed.keys():
            await self.write_index()
        if self._lost(frames):
            await self.index.refresh()
        if lost := self._lost(frames):
            raise QuorumUnavailable(f"pack {lost[0]}, which this snapshot has blocks in, is not stored: try again")

    def _lost(self, frames: Mapping[bytes, Iterable[int]]) -> list[str]:
        """The packs of those that no index knows."""
        return [pack.hex() for pack, numbers in frames.items() if not self.hold({pack: numbers}, ())]

    # ---- index

    async def write_index(self) -> None:
        """One index object of all packs that have none."""
        async with self._indexing:
            packs = dict(self._unindexed)
            if packs:
                await self._put_index(Index(tuple(entry for entry, _ in packs.values())))
        for pack, (entry, hashes) in packs.items():
            if self._unindexed.pop(pack, None) is not None:
                part = entry.part(pack)
                assert part is not None
                self.dedupe.confirm(pack, part.numbers, hashes)
        await self._bound_hashes()

    async def _bound_hashes(self) -> None:
        """Where many have gathered, begin to write them; nobody waits for that but whoever brings as many again."""
        while self.dedupe.wants_writing and self._hashes is not None and not self._hashes.done():
            await asyncio.shield(self._hashes)
        if self.dedupe.wants_writing:
            self._hashes = asyncio.create_task(self.write_hashes())

    async def write_hashes(self) -> None:
        """Put new hashes into their file."""
        async with self._writing:
            await asyncio.get_running_loop().run_in_executor(self._file_thread, self.dedupe.write)

    async def _put_index(self, index: Index) -> None:
        name, stored = encode_index(self.repository.keys, index, secrets.token_bytes(SALT_SIZE))
        await self.repository.store.put(index_key(name), stored)
        self.index.note(name, index)

    # ---- what others stored

    async def look(self, snapshot: str = "") -> None:
        """Learn what is in the store by now: what others stored, and what is gone.

        Packs that were made for `snapshot` and that no index names are indexed: an earlier attempt left them.
        """
        await self.index.refresh()
        listed = await self.index.list_objects()
        await self.write_hashes()
        dedupe = self.dedupe
        async with self._writing:
            # What is in the file was indexed before, so nothing that this process just stored counts as gone.
            frames = frames_by_pack(self.index.present())
            gone = [pack for pack in dedupe.packs if dedupe.frames_of(pack) & ~frames.get(pack, 0)]
            await asyncio.to_thread(dedupe.forget, gone)
        new = {pack for pack, bits in frames.items() if bits & ~dedupe.frames_of(pack)}
        entries = [each for each in self.index.present() if any(part.pack in new for part in each.parts)]
        trailers = ahead(self._read_trailer, [ObjectInfo(each.object, each.size) for each in entries])
        async with aclosing(trailers) as read:
            async for _, trailer in read:
                await self._learn(trailer)
        if snapshot:
            await self._recover(snapshot, listed)
        await self.write_hashes()

    async def _recover(self, snapshot: str, listed: Mapping[str, int]) -> None:
        """Index those of the objects `listed` that no index names and that were made for `snapshot`."""
        known = self.index.map.entries.keys() | self.index.map.replaced
        known |= {entry.object for entry, _ in self._unindexed.values()}
        self._orphans = {name: made_for for name, made_for in self._orphans.items() if name in listed}
        unknown = [
            ObjectInfo(name, size)
            for name, size in listed.items()
            if name not in known and (name not in self._orphans or snapshot in self._orphans[name])
        ]
        found: list[IndexEntry] = []
        async with aclosing(ahead(self._read_trailer, unknown)) as read:
            async for info, trailer in read:
                made_for = {part.snapshot for part in trailer.parts} if trailer else set()
                self._orphans[info.key] = frozenset(made_for)
                if trailer is not None and snapshot in made_for:
                    found.append(IndexEntry(info.key, info.size, trailer.parts))
                    await self._learn(trailer)
        for at in range(0, len(found), MAX_INDEX_ENTRIES):
            await self._put_index(Index(tuple(found[at : at + MAX_INDEX_ENTRIES])))
        if found:
            _log.info("packs of an earlier attempt are taken over", snapshot=snapshot, packs=len(found))

    async def _learn(self, trailer: Trailer | None) -> None:
        for part, hashes in zip(trailer.parts, trailer.hashes, strict=True) if trailer else ():
            self.dedupe.add(part.pack, part.numbers, hashes)
        await self._bound_hashes()

    async def _read_trailer(self, info: ObjectInfo) -> tuple[ObjectInfo, Trailer | None]:
        """Of the object named info.key. None where it is gone or cannot be read: its blocks are not found then."""
        try:
            return info, await load_trailer(self.repository, info.key, info.size)
        except NotFound:
            return info, None
        except Corrupt as error:
            _log.error("the blocks of a damaged pack are not used for new snapshots", error=str(error))
            return info, None

    async def close(self) -> None:
        """Index what is stored, keep the hashes. What is still on its way is given up by its makers before."""
        try:
            await self.write_index()
        except CairnError as error:
            _log.warning("the last packs are not indexed; the next start finds them", error=str(error))
        if self._hashes is not None:
            await asyncio.shield(self._hashes)
        async with self._writing:
            await asyncio.to_thread(self.dedupe.close)
        self._file_thread.shutdown(wait=False)
        self._threads.shutdown(wait=False, cancel_futures=True)
