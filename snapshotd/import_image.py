"""Import: a stream of raw content becomes a completed snapshot, as if it had been shipped.

Chunks come in order; what is left out between two of them is zero. They are cut into whole blocks, and the writer
does the rest: hashing, deduplication, packs, manifest. Control hears of the snapshot when all of it is stored and
safe from every prune (snapshotd.vouch). What was stored before a failure is garbage that prune removes; a root
that control refused is deleted at once, because nothing would ever remove it. Where control's answer was lost the
root stays: the snapshot may be in the catalog.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from blockstore.errors import AlreadyExists, Conflict, Corrupt, InvalidRequest, OutOfRange, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MAX_VOLUME_SIZE
from snapshotd.adopt import add_to_catalog
from snapshotd.inventory import load_quarantines
from snapshotd.layout import root_key
from snapshotd.pack_store import PackStore
from snapshotd.prune_plan import merge_marks
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root
from snapshotd.roots import Catalog
from snapshotd.writer import SnapshotWriter

#: What is handed to the writer at once.
_BATCH_BYTES: Final = 1 << 20
#: A client that sends nothing for so long, as one does whose pipe stands still, is waited for without holding memory.
_STALLED_S: Final = 1.0
#: After these control does not have the snapshot.
_REFUSED: Final = (AlreadyExists, Conflict, Corrupt, InvalidRequest)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Content from byte `offset` of the image on."""

    offset: int
    data: bytes


class BlockStream:
    """Cuts chunks into whole blocks for a writer; gaps become zeroes, and whole blocks of them nothing at all."""

    def __init__(self, writer: SnapshotWriter, size_bytes: int) -> None:
        self._writer = writer
        self._size_bytes = size_bytes
        self._start = 0
        self._buffer = bytearray()

    async def add(self, chunk: Chunk) -> None:
        """Raises InvalidRequest for a chunk out of order, OutOfRange for one beyond the image's end."""
        position = self._start + len(self._buffer)
        if chunk.offset < position:
            raise InvalidRequest(f"bytes from {chunk.offset} on come after byte {position}: chunks have to be in order")
        if chunk.offset + len(chunk.data) > self._size_bytes:
            end = chunk.offset + len(chunk.data)
            raise OutOfRange(f"content up to byte {end} of an image of {self._size_bytes}")
        if chunk.offset > position:
            await self._skip_to(chunk.offset)
        self._buffer += chunk.data
        if len(self._buffer) >= _BATCH_BYTES:
            await self._hand_on(len(self._buffer) // BLOCK_SIZE * BLOCK_SIZE)

    async def end(self) -> None:
        """The rest of the last block is zero."""
        self._buffer += bytes(-len(self._buffer) % BLOCK_SIZE)
        await self._hand_on(len(self._buffer))

    async def _skip_to(self, offset: int) -> None:
        """Zeroes up to `offset`: within the block that is begun they are written, after it blocks are left out."""
        begun = self._start + len(self._buffer) + -len(self._buffer) % BLOCK_SIZE
        if offset >= begun:
            await self.end()
            self._start = offset // BLOCK_SIZE * BLOCK_SIZE
        self._buffer += bytes(offset - self._start - len(self._buffer))

    async def _hand_on(self, size: int) -> None:
        if size:
            await self._writer.put_blocks(self._start // BLOCK_SIZE, bytes(self._buffer[:size]))
            del self._buffer[:size]
            self._start += size


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of an image before its content comes. size_bytes is rounded up to whole blocks."""

    snapshot: str
    size_bytes: int
    description: str
    tags: dict[str, str]
    now_ms: int

    def root(self) -> Root:
        """The root without shards. Raises InvalidRequest for a size that no volume has."""
        if not 0 < self.size_bytes <= MAX_VOLUME_SIZE:
            raise InvalidRequest(f"an image of {self.size_bytes} bytes: from 1 to {MAX_VOLUME_SIZE} are possible")
        return Root(
            snapshot=self.snapshot,
            volume="",
            volume_name="",
            size_bytes=-(-self.size_bytes // BLOCK_SIZE) * BLOCK_SIZE,
            created_at_ms=self.now_ms,
            sealed_at_ms=self.now_ms,
            completed_at_ms=self.now_ms,
            description=self.description,
            tags=self.tags,
        )


async def import_image(
    packs: PackStore,
    reader: SnapshotReader,
    catalog: Catalog,
    facts: ImageFacts,
    chunks: AsyncIterator[Chunk],
    *,
    cluster: str,
) -> pb.Snapshot:
    """The completed snapshot. Raises InvalidRequest, OutOfRange, NoSpace, QuorumUnavailable, and Conflict where the
    store is not this cluster's, or a prune came in the way too often.
    """
    root = facts.root()
    await packs.repository.check_owner(cluster)
    # As a ship does: what is in quarantine now, or gone, is no place to refer to.
    quarantined = merge_marks((await load_quarantines(packs.repository)).values())
    await packs.look(facts.snapshot)
    writer = SnapshotWriter(packs, reader, facts.snapshot, root.size_bytes)
    writer.shunned = quarantined
    try:
        stream = BlockStream(writer, root.size_bytes)
        while (chunk := await _next_chunk(chunks, writer)) is not None:
            await stream.add(chunk)
        await stream.end()
        await writer.settle()
    except BaseException:
        await writer.cancel()
        raise
    written = await writer.finish(root)
    try:
        # As a ship does, behind the root: who takes the store over from here on sees it.
        await packs.repository.check_owner(cluster)
        return await add_to_catalog(packs.repository, catalog, *written)
    except _REFUSED:
        await asyncio.shield(packs.repository.store.delete(root_key(facts.snapshot, written[1])))
        raise
    except QuorumUnavailable as error:
        raise QuorumUnavailable(
            f"the image is stored as {facts.snapshot}; where `cairn snapshot list` does not show it, "
            f"`cairn store adopt` makes it known: {error}"
        ) from error


async def _next_chunk(chunks: AsyncIterator[Chunk], writer: SnapshotWriter) -> Chunk | None:
    """The next one, None behind the last. While none comes no pack is held open: ships need its place."""
    coming = asyncio.ensure_future(anext(chunks, None))
    try:
        if not (await asyncio.wait({coming}, timeout=_STALLED_S))[0]:
            writer.pause()
        return await coming
    finally:
        coming.cancel()
