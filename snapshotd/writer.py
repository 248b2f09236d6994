"""Writes one snapshot into the object store: hashed, deduplicated, packed; then its manifest; its root last.

    batch -> hash, look up (threads) -> place, in order -> compress, encrypt (threads) -> packs -> index -> shards

Some batches are hashed at once; they are placed in the order in which they were put. All-zero blocks are not mapped.
A crash at any point leaves garbage at worst: nothing names an object that is not stored. The same snapshot
written again finds the blocks of its first attempt, and uploads none of them twice.

Memory: the batches under way, the packs (snapshotd.pack_store), and the changes to the manifest, which is written
whenever 64 Ki of them have gathered.
"""

import asyncio
import dataclasses
import secrets
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from blockstore.errors import Corrupt, InvalidRequest, OutOfRange, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MIB
from blockstore.volume.block_bits import set_bits
from blockstore.volume.changes import Run
from snapshotd import bitmap
from snapshotd.crypto import SALT_SIZE, DomainKeys
from snapshotd.dedupe import Dedupe
from snapshotd.layout import root_key
from snapshotd.manifest import SHARD_BLOCKS, BlockRef
from snapshotd.pack_store import PackStore
from snapshotd.packer import Packer
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root, Statistics, encode_root
from snapshotd.shard_writer import ShardWriter

#: 1 MiB: what one call to a thread hashes.
_BATCH_BLOCKS: Final = EXTENT_BLOCKS
_BATCHES_AHEAD: Final = 4
#: About 11 MB of references; 256 MiB of blocks. A pack is closed early each time.
_MANIFEST_AT: Final = 65_536


@dataclasses.dataclass(frozen=True, slots=True)
class _Batch:
    """What a thread made of some blocks. digests: None for a block of zeroes; found: of those stored already.

    blocks: parts of one payload, which each of them keeps in memory.
    """

    runs: Sequence[Run]
    blocks: list[memoryview]
    digests: list[bytes | None]
    found: dict[bytes, BlockRef]


class SnapshotWriter:
    """Writes `snapshot`, of a volume of size_bytes, as a change of `base` (None: of a volume of zeroes).

    One caller at a time. `cancel` it where it is not finished.
    """

    def __init__(
        self, packs: PackStore, reader: SnapshotReader, snapshot: str, size_bytes: int, base: Root | None = None
    ) -> None:
        self.snapshot = snapshot
        self.shunned: Collection[bytes] = frozenset()
        """Packs in which no block is found: somebody means to delete them, as this snapshot's writer saw it."""
        self._packs = packs
        self._reader = reader
        self._blocks = -(-size_bytes // BLOCK_SIZE)
        self._packer = Packer(packs, snapshot)
        self._shards = ShardWriter(packs, reader, base)
        self._hashing: deque[asyncio.Task[_Batch]] = deque()
        self._manifest: asyncio.Task[None] | None = None
        self._put: dict[int, bytearray] = {}
        """By shard, the bitmap of the blocks that were put here."""

    @property
    def stored_bytes(self) -> int:
        """What went to the object store so far."""
        return self._packer.stored_bytes + self._shards.stored_bytes

    @property
    def shards(self) -> dict[int, str]:
        """As written so far, by number: up to date after `settle`."""
        return self._shards.shards

    async def put_blocks(self, start: int, payload: bytes | memoryview) -> None:
        """The content of whole blocks from block `start` on. Returns when it may be given more.

        Raises OutOfRange, InvalidRequest, and whatever storing earlier blocks failed with.
        """
        count, rest = divmod(len(payload), BLOCK_SIZE)
        if rest:
            raise InvalidRequest(f"{len(payload)} bytes are not whole blocks")
        if not 0 <= start <= start + count <= self._blocks:
            raise OutOfRange(f"blocks {start} to {start + count} of a volume of {self._blocks}")
        for at in range(0, count, _BATCH_BLOCKS):
            part = payload[at * BLOCK_SIZE : (at + _BATCH_BLOCKS) * BLOCK_SIZE]
            await self.put_runs([Run(start + at, len(part) // BLOCK_SIZE)], part)

    async def put_runs(self, runs: Sequence[Run], payload: bytes | memoryview) -> None:
        """The content of `runs`, at most 1 MiB in all, one after the other. Otherwise as `put_blocks`."""
        if sum(run.length for run in runs) * BLOCK_SIZE != len(payload) or len(payload) > MIB:
            raise InvalidRequest(f"{len(payload)} bytes for {len(runs)} runs: they must be as long, and 1 MiB at most")
        if any(not 0 <= run.start <= run.start + run.length <= self._blocks for run in runs):
            raise OutOfRange(f"runs {runs} of a volume of {self._blocks} blocks")
        while len(self._hashing) >= _BATCHES_AHEAD:
            await self._place_next()
        work = self._packs.in_thread(_hash, self._packs.repository.keys, self._packs.dedupe, runs, payload)
        self._hashing.append(asyncio.create_task(work))

    async def settle(self) -> None:
        """Until all that was put is stored, indexed, and in shards."""
        await self._place_all()
        await self._packer.settle()
        await self._write_manifest()
        await self._manifest_written()

    def pause(self) -> None:
        """Nothing more comes for a while: hold no pack open, its place serves others."""
        self._packer.close_pack()

    async def mend_shards(self, quarantined: Collection[bytes]) -> None:
        """Store those shards again that a prune means to delete: no root has named them so far. After `settle`."""
        await self._shards.write_again(await self._shards.lost(quarantined))

    async def stale_runs(self, quarantined: Collection[bytes]) -> list[Run]:
        """The blocks that were put here and whose place is in a quarantined pack, or gone; to be put again.

        After `settle`, `mend_shards`, and a look at what is stored.
        """
        runs: list[Run] = []
        for number in sorted(self._put.keys() & self.shards.keys()):
            try:
                shard = await self._reader.shard_named(self.shards[number], background=True)
            except Corrupt as error:
                raise QuorumUnavailable(f"a prune took a shard before the snapshot was complete: {error}") from error
            bad = {
                (pack, frame)
                for pack, frames in shard.frames().items()
                for frame in frames
                if pack in quarantined or not self._packs.index.holds(pack, frame)
            }
            if bad:
                blocks = (block for block in bitmap.numbers(bytes(self._put[number])) if _names(shard[block], bad))
                found = bitmap.from_numbers(blocks, SHARD_BLOCKS)
                runs += [Run(number * SHARD_BLOCKS + start, length) for start, length in bitmap.runs(found)]
        return runs

    async def finish(self, facts: Root) -> tuple[Root, bytes]:
        """Store the root: (it, the SHA-256 of its object); after `settle`.

        facts: all but shards and statistics. One that is there of that snapshot stays (snapshotd.root_objects).
        """
        changed = self._shards.changed_blocks
        stored_before = max(0, changed - self._shards.removed_blocks - self._packer.blocks)
        statistics = Statistics(
            logical_bytes=self._shards.logical_blocks * BLOCK_SIZE,
            changed_bytes=changed * BLOCK_SIZE,
            deduplicated_bytes=stored_before * BLOCK_SIZE,
            stored_bytes=self.stored_bytes,
        )
        root = dataclasses.replace(facts, shards=dict(self.shards), statistics=statistics)
        keys, salt = self._packs.repository.keys, secrets.token_bytes(SALT_SIZE)
        stored, digest = await asyncio.to_thread(encode_root, keys, root, salt)
        await self._packs.repository.store.put(root_key(self.snapshot, digest), stored)
        return root, digest

    async def cancel(self) -> None:
        """Give up what is under way; what is stored stays, and is found by the next attempt."""
        tasks: list[asyncio.Task[object]] = [*self._hashing, *([self._manifest] if self._manifest else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._hashing.clear()
        await self._packer.cancel()

    # ---- in order

    async def _place_all(self) -> None:
        while self._hashing:
            await self._place_next()

    async def _place_next(self) -> None:
        """The oldest batch gets its places."""
        batch = await self._hashing[0]
        self._hashing.popleft()
        await self._packer.wait_for_room()
        self._place(batch)
        if self._shards.count >= _MANIFEST_AT:
            await self._write_manifest()

    def _place(self, batch: _Batch) -> None:
        refs = self._refs(batch)
        self._packer.let_go()
        at = 0
        for run in batch.runs:
            for start, length in _in_shards(run):
                self._shards.set(start, refs[at : at + length])
                self._note_put(start, length)
                at += length

    def _refs(self, batch: _Batch) -> list[BlockRef | None]:
        """Where each block is, or will be from here on."""
        find_recent, add, shunned = self._packs.dedupe.find_recent, self._packer.add, self.shunned
        found = batch.found
        if shunned:
            found = {digest: ref for digest, ref in found.items() if ref.pack not in shunned}
        refs: list[BlockRef | None] = []
        for digest, content in zip(batch.digests, batch.blocks, strict=True):
            ref = None
            if digest is not None:
                ref = found.get(digest) or find_recent(digest)
                if ref is None or ref.pack in shunned:
                    ref = add(digest, content)
            refs.append(ref)
        return refs

    def _note_put(self, start: int, count: int) -> None:
        """Within one shard."""
        number, first = divmod(start, SHARD_BLOCKS)
        bits = self._put.get(number)
        if bits is None:
            bits = self._put[number] = bytearray(SHARD_BLOCKS // 8)
        set_bits(bits, first, count)

    async def _write_manifest(self) -> None:
        """Begin to write the shards that changed, once those before are written."""
        await self._manifest_written()
        self._packer.close_pack()
        self._manifest = asyncio.create_task(self._shards.write())
        await asyncio.sleep(0)  # it takes the changes before the next one comes

    async def _manifest_written(self) -> None:
        if self._manifest is not None:
            await self._manifest
            self._manifest = None


def _in_shards(run: Run) -> Iterator[Run]:
    """The parts of `run` that lie in one shard each."""
    start, end = run.start, run.start + run.length
    while start < end:
        length = min(end - start, SHARD_BLOCKS - start % SHARD_BLOCKS)
        yield Run(start, length)
        start += length


def _names(ref: BlockRef | None, frames: Collection[tuple[bytes, int]]) -> bool:
    return ref is not None and (ref.pack, ref.frame) in frames


def _hash(keys: DomainKeys, dedupe: Dedupe, runs: Sequence[Run], payload: bytes | memoryview) -> _Batch:
    view = memoryview(payload)
    blocks = [view[at : at + BLOCK_SIZE] for at in range(0, len(payload), BLOCK_SIZE)]
    hashes, zeroes = keys.block_hashes(blocks), keys.hash_of_zeroes
    digests: list[bytes | None] = [None if digest == zeroes else digest for digest in hashes]
    found = dedupe.find([digest for digest in digests if digest is not None])
    return _Batch(runs, blocks, digests, found)
