"""Live frames move, as they are, from objects that go away into new ones.

Each source is read whole and checked against its name first, so damage is never copied into an object
that looks sound; a damaged source is left where it is. Manifests name packs and frame numbers, which do not
change. Memory: a few sources and one new object at a time.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import structlog

from blockstore.errors import Corrupt
from snapshotd.ahead import ahead
from snapshotd.crypto import check_name
from snapshotd.index import IndexEntry
from snapshotd.layout import pack_key
from snapshotd.pack import FOOTER_SIZE, ObjectWriter, decode_trailer, trailer_range
from snapshotd.references import Frames
from snapshotd.repository import Repository

_log = structlog.get_logger(__name__)

#: Sources read ahead: each takes 16 MiB.
_WIDTH: Final = 3


@dataclass(frozen=True, slots=True)
class LiveFrame:
    """A stored frame with all that a trailer says of it."""

    pack: bytes
    snapshot: str
    number: int
    stored: bytes
    hashes: tuple[bytes, ...]


@dataclass(slots=True)
class Repacked:
    """entries: of the new objects. moved: names of the sources that they took all live frames from.

    damaged: names of sources that were left alone.
    """

    entries: list[IndexEntry] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)


async def repack(
    repository: Repository, sources: Mapping[str, Frames], salt: Callable[[], bytes], done: Callable[[int], None]
) -> Repacked:
    """Store the live frames of `sources` in new objects, of which no index knows yet.

    salt: 16 fresh random bytes each time. done: told the bytes of frames after each source. Raises NotFound where
    a source is gone: another prune is at work.
    """
    result = Repacked()
    writer = _Writer(repository, salt, result)
    order = sorted(sources, key=lambda name: (min(sources[name]), name))

    async def load(name: str) -> tuple[str, list[LiveFrame] | None]:
        try:
            return name, await _live_frames(repository, name, sources[name])
        except Corrupt as error:
            _log.error("a damaged object is not repacked; verify tells which snapshots need it", error=str(error))
            return name, None

    async with aclosing(ahead(load, order, _WIDTH)) as loaded:
        async for name, frames in loaded:
            if frames is None:
                result.damaged.add(name)
                continue
            for frame in frames:
                await writer.add(frame)
            result.moved.add(name)
            done(sum(len(frame.stored) for frame in frames))
    await writer.finish()
    return result


class _Writer:
    """One new object after the other; the frames of a pack follow one another in each."""

    def __init__(self, repository: Repository, salt: Callable[[], bytes], result: Repacked) -> None:
        self._repository = repository
        self._salt = salt
        self._result = result
        self._object: ObjectWriter | None = None
        self._last: dict[bytes, int] = {}
        self._pack = b""

    async def add(self, frame: LiveFrame) -> None:
        """Append it; what it does not fit behind is finished first."""
        returns = frame.pack in self._last and (frame.pack != self._pack or self._last[frame.pack] >= frame.number)
        if self._object is not None and (self._object.full or returns):
            await self.finish()
        if self._object is None:
            self._object = ObjectWriter(self._repository.keys, self._salt())
        self._object.copy(frame.pack, frame.snapshot, frame.number, frame.stored, frame.hashes)
        self._pack, self._last[frame.pack] = frame.pack, frame.number

    async def finish(self) -> None:
        """Store what is gathered, if anything is."""
        if self._object is None:
            return
        done, self._object, self._last = self._object, None, {}
        name, buffers, entry = await asyncio.to_thread(done.finish)
        await self._repository.store.put(pack_key(name), buffers)
        self._result.entries.append(entry)


async def _live_frames(repository: Repository, name: str, live: Frames) -> list[LiveFrame]:
    key = pack_key(name)
    stored = await repository.store.get(key)
    check_name(name, stored, key)
    start, length = trailer_range(stored[-FOOTER_SIZE:], len(stored), key)
    trailer = decode_trailer(repository.keys, stored[start : start + length], start, key)
    found = [
        LiveFrame(part.pack, part.snapshot, frame.number, stored[frame.offset : frame.offset + frame.length], hashes)
        for part, of_frames in zip(trailer.parts, trailer.hashes, strict=True)
        for frame, hashes in zip(part, of_frames, strict=True)
        if live.get(part.pack, 0) >> frame.number & 1
    ]
    if sum(bits.bit_count() for bits in live.values()) != len(found):
        raise Corrupt(f"{key} has other frames than its index says")
    return found
