"""Reads stored snapshots: lazily, once for all who ask, and verified down to each frame.

The root is read first, then only the shards that are asked for, each with the chain of patches below it, then single
frames by ranged GETs. Roots, shards and indexes are checked against their SHA-256 names, frames by their
authentication; what fails is Corrupt and named. An object of frames that is gone may have been repacked: the
index is read again, as long as it has news, before that is Corrupt too.

Everything is kept in two caches of bounded size (frames, and what describes them). A guest who waits comes before the
background (snapshotd.gate).
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from blockstore.errors import Corrupt, InvalidRequest, NotFound, OutOfRange
from blockstore.units import BLOCK_SIZE
from snapshotd import bitmap
from snapshotd.cache import FlightCache
from snapshotd.frame import open_bodies, open_frame
from snapshotd.gate import Gate, Ticket
from snapshotd.index import Frame as Placed
from snapshotd.layout import pack_key, shard_key
from snapshotd.manifest import (
    MAX_DEPTH,
    SHARD_BLOCKS,
    BlockRef,
    FramePart,
    Shard,
    ShardObject,
    build_shard,
    decode_shard,
)
from snapshotd.object_store import ObjectStore
from snapshotd.pack_index import PackIndex
from snapshotd.repository import Repository
from snapshotd.root import Root, decode_root
from snapshotd.root_objects import get_root

#: Requests to the object store at once, one of them for guests only.
_PLACES: Final = 16
#: A Shard in memory: 8 bytes a block, and its table of packs.
_SHARD_BYTES: Final = SHARD_BLOCKS * 8 + 16_384
_RUN_BYTES: Final = 120
_ROOT_SHARD_BYTES: Final = 200
#: Of the cache: the rest is for frames.
_MANIFEST_SHARE: Final = 0.5
#: More blocks than this in one call would be read into memory at once.
MAX_READ_BLOCKS: Final = 8192

Frame = bytes
"""The blocks of a frame, one after the other."""


class SnapshotReader:
    """Of one repository. cache_bytes: for what was read."""

    def __init__(self, repository: Repository, cache_bytes: int, index: PackIndex | None = None) -> None:
        self.repository = repository
        self.index = index or PackIndex(repository)
        self.frames_fetched = 0
        """From the object store; and their bytes, as they are stored."""
        self.frame_bytes = 0
        gate = self._gate = Gate(_PLACES)
        manifest_bytes = int(cache_bytes * _MANIFEST_SHARE)
        self._frames = FlightCache[tuple[bytes, int], Frame](cache_bytes - manifest_bytes, _frame_bytes, gate)
        self._shards = FlightCache[str, Shard](manifest_bytes // 2, lambda _: _SHARD_BYTES, gate)
        self._stored_shards = FlightCache[str, ShardObject](manifest_bytes // 4, _stored_shard_bytes, gate)
        self._roots = FlightCache[tuple[str, bytes], Root](manifest_bytes // 4, _root_bytes, gate)

    @property
    def store(self) -> ObjectStore:
        return self.repository.store

    # ---- manifests

    async def root(self, snapshot: str, expected: bytes, *, background: bool = False) -> Root:
        """The root of `snapshot`; expected: its SHA-256 as the catalog has it.

        Raises Corrupt where it is damaged or gone.
        """

        async def load(ticket: Ticket) -> Root:
            try:
                async with ticket:
                    _, stored = await get_root(self.store, snapshot, expected)
            except NotFound as error:
                raise Corrupt(f"the root of {snapshot} is gone from {self.store.url}") from error
            # A root of a large volume has a name for each 128 MiB of it.
            return await asyncio.to_thread(decode_root, self.repository.keys, snapshot, stored, expected)

        return await self._roots.get((snapshot, expected), load, background=background)

    async def shard(self, root: Root, number: int, *, background: bool = False) -> Shard | None:
        """What shard `number` maps, None where that is nothing. It is shared: not to be changed."""
        name = root.shards.get(number)
        return None if name is None else await self.shard_named(name, background=background)

    async def shard_named(self, name: str, *, background: bool = False) -> Shard:
        """The shard of that name, with all that it is a patch on. Shared: not to be changed. Raises Corrupt."""

        async def load(ticket: Ticket) -> Shard:
            chain = [await self.stored_shard(name, background=ticket.background)]
            while (base := chain[-1].base) is not None:
                if len(chain) > MAX_DEPTH:
                    raise Corrupt(f"shard {name} is a patch on more than {MAX_DEPTH} others")
                chain.append(await self.stored_shard(base, background=ticket.background))
            return await asyncio.to_thread(build_shard, chain[::-1])

        return await self._shards.get(name, load, background=background)

    async def stored_shard(self, name: str, *, background: bool = False) -> ShardObject:
        """One stored shard by itself. Raises Corrupt where it is damaged or gone."""

        async def load(ticket: Ticket) -> ShardObject:
            try:
                async with ticket:
                    stored = await self.store.get(shard_key(name))
            except NotFound as error:
                raise Corrupt(f"shard {name} is gone from {self.store.url}") from error
            return await asyncio.to_thread(decode_shard, self.repository.keys, name, stored)

        return await self._stored_shards.get(name, load, background=background)

    async def mapped(self, root: Root, number: int, *, background: bool = False) -> bytes:
        """The bitmap of the blocks that shard `number` maps: 4,096 bytes, or none where it maps nothing."""
        shard = await self.shard(root, number, background=background)
        return b"" if shard is None else shard.mapped()

    def forget_root(self, snapshot: str) -> None:
        """It was deleted."""
        self._roots.drop_where(lambda key: key[0] == snapshot)

    # ---- content

    async def read(self, root: Root, start: int, count: int, *, background: bool = False) -> tuple[bytes, bytes]:
        """(bitmap of those that are mapped, their content in order) of `count` blocks from block `start` on.

        Raises OutOfRange, InvalidRequest for more than MAX_READ_BLOCKS, Corrupt, QuorumUnavailable.
        """
        mapped, pieces = await self.read_pieces(root, start, count, background=background)
        return mapped, b"".join(pieces)

    async def read_pieces(
        self, root: Root, start: int, count: int, *, background: bool = False
    ) -> tuple[bytes, list[memoryview]]:
        """As `read`, with the content as it lies in frames: for who puts it together with something else."""
        if count > MAX_READ_BLOCKS:
            raise InvalidRequest(f"{count} blocks at once: at most {MAX_READ_BLOCKS}")
        parts = await self._parts(root, start, count, background)
        wanted = list(dict.fromkeys((part.pack, part.frame) for _, part in parts))
        frames = dict(zip(wanted, await self._gather(wanted, background), strict=True))
        pieces = [_cut(frames[part.pack, part.frame], part) for _, part in parts]
        return bitmap.from_runs(((first - start, part.length) for first, part in parts), count), pieces

    async def block(self, ref: BlockRef, *, background: bool = False) -> bytes:
        """One block. Raises Corrupt where it is damaged or gone."""
        frame = await self.frame(ref.pack, ref.frame, background=background)
        return bytes(_cut(frame, FramePart(0, 1, *ref)))

    async def frame(self, pack: bytes, number: int, *, background: bool = False) -> Frame:
        """The blocks of one frame. Raises Corrupt where it is damaged or gone."""

        async def load(ticket: Ticket) -> Frame:
            async with ticket:
                stored = await self._stored_frame(pack, number)
            self.frames_fetched += 1
            self.frame_bytes += len(stored)
            # A quarter of a MiB takes 0.3 ms: less than the way to a thread and back where the loop is busy.
            return open_frame(self.repository.keys, pack, number, stored)

        return await self._frames.get((pack, number), load, background=background)

    async def bodies(self, pack: bytes, numbers: Sequence[int]) -> list[bytes]:
        """The bodies (snapshotd.frame) of these frames of one pack, in this order; they are not kept.

        For the background. What lies one behind the other is read as one. Raises Corrupt as `frame`.
        """
        await self.index.load()
        async with self._gate.ticket(background=True):
            stored = await self._stored_frames(pack, numbers)
        self.frames_fetched += len(stored)
        self.frame_bytes += sum(map(len, stored))
        return await asyncio.to_thread(open_bodies, self.repository.keys, pack, list(zip(numbers, stored, strict=True)))

    async def _stored_frames(self, pack: bytes, numbers: Sequence[int]) -> list[bytes | memoryview]:
        """From an object that holds all of them, if there is one; else each by itself."""
        for entry in self.index.map.objects_of(pack):
            part = entry.part(pack)
            frames = [part.find(number) for number in numbers] if part else []
            placed = [frame for frame in frames if frame is not None]
            if placed and len(placed) == len(numbers):
                try:
                    return await self._read_runs(pack_key(entry.object), placed)
                except NotFound:
                    break
        return [await self._stored_frame(pack, number) for number in numbers]

    async def _read_runs(self, key: str, frames: Sequence[Placed]) -> list[bytes | memoryview]:
        """Frames of one object, one request for each run without a gap."""
        found: list[bytes | memoryview] = []
        while len(found) < len(frames):
            first = end = frames[len(found)].offset
            run = []
            for frame in frames[len(found) :]:
                if frame.offset != end:
                    break
                run.append(frame)
                end += frame.length
            stored = memoryview(await self.store.get_range(key, first, end - first))
            found += [stored[frame.offset - first :][: frame.length] for frame in run]
        return found

    async def _parts(self, root: Root, start: int, count: int, background: bool) -> list[tuple[int, FramePart]]:
        """Where the mapped ones of these blocks are: (first block of the volume, part). Raises OutOfRange."""
        if not 0 <= start <= start + count <= root.blocks:
            raise OutOfRange(f"blocks {start} to {start + count} of {root.snapshot}, which has {root.blocks}")
        found: list[tuple[int, FramePart]] = []
        for number in range(start // SHARD_BLOCKS, -(-(start + count) // SHARD_BLOCKS)):
            shard, base = await self.shard(root, number, background=background), number * SHARD_BLOCKS
            first, end = max(start - base, 0), min(start + count - base, SHARD_BLOCKS)
            if shard is not None:  # whose length takes as long to tell as all its parts
                found += [(base + part.start, part) for part in shard.parts(first, end - first)]
        return found

    async def _gather(self, wanted: Sequence[tuple[bytes, int]], background: bool) -> list[Frame]:
        if len(wanted) == 1:
            return [await self.frame(*wanted[0], background=background)]
        tasks = [asyncio.ensure_future(self.frame(*each, background=background)) for each in wanted]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _stored_frame(self, pack: bytes, number: int) -> bytes:
        """From the first object that is there, of those that are said to hold it; the index may be old.

        It is read again as long as it names an object that was not tried: each is a prune that moved the frame
        between two requests of ours. A new object's index is there before the old object goes, so one that names
        none but those that were gone before says that the frame is lost.
        """
        await self.index.load()
        places = dict(self.index.locate(pack, number))
        gone: set[str] = set()
        while True:
            for name in sorted(places.keys() - gone):
                try:
                    return await self.store.get_range(pack_key(name), places[name].offset, places[name].length)
                except NotFound:
                    gone.add(name)
            await self.index.refresh()
            places = dict(self.index.locate(pack, number))
            if places.keys() <= gone:
                raise Corrupt(f"frame {number} of pack {pack.hex()} is gone: {self._why_gone(list(places))}")

    def _why_gone(self, names: list[str]) -> str:
        if names:
            return f"{' and '.join(map(pack_key, names))} in {self.store.url} should hold it"
        return "; ".join(["no index says where it is", *map(str, self.index.damaged.values())])


def _cut(frame: Frame, part: FramePart) -> memoryview:
    """The blocks of a part, out of its frame."""
    at, end = part.slot * BLOCK_SIZE, (part.slot + part.length) * BLOCK_SIZE
    if end > len(frame):
        raise Corrupt(
            f"a shard names slot {part.slot + part.length - 1} of frame {part.frame} of pack {part.pack.hex()}: "
            f"it has {len(frame) // BLOCK_SIZE}"
        )
    return memoryview(frame)[at:end]


def _frame_bytes(frame: Frame) -> int:
    return len(frame) + 200


def _stored_shard_bytes(shard: ShardObject) -> int:
    return _RUN_BYTES * len(shard.runs) + 64 * len(shard.packs) + 200


def _root_bytes(root: Root) -> int:
    return _ROOT_SHARD_BYTES * len(root.shards) + 1000
