"""Makes packs of one snapshot's new blocks.

A block gets its place (pack, frame, slot) at once, so that the next one like it may refer to it. Frames of 64 blocks
in order are compressed and encrypted on threads and put into their pack in the order of their numbers; the pack is
uploaded when it has about 16 MiB. A pack's salt is drawn for it alone and a frame number is given once, so no key
meets a nonce twice. What does not reach the store is disowned: nobody finds its blocks any more.
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

from snapshotd.crypto import SALT_SIZE
from snapshotd.frame import FRAME_BLOCKS, MAX_STORED_FRAME, compress_frame
from snapshotd.index import MAX_OBJECT_FRAMES, IndexEntry
from snapshotd.layout import pack_key
from snapshotd.manifest import BlockRef
from snapshotd.pack import PACK_SIZE, ObjectWriter
from snapshotd.pack_store import PackStore

#: Frames that are compressed at once or wait for it: two for each thread of a usual machine.
_FRAMES_AHEAD: Final = 8


class Packer:
    """Of one snapshot, in the event loop's thread. A failure is raised by the next `wait_for_room` or `settle`."""

    def __init__(self, packs: PackStore, snapshot: str) -> None:
        self.stored_bytes = 0
        """Of packs that are in the store."""
        self.blocks = 0
        """That were put into packs."""
        self._packs = packs
        self._snapshot = snapshot
        self._open: _Pack | None = None
        self._working: set[asyncio.Task[None]] = set()
        self._failed: Exception | None = None

    async def wait_for_room(self) -> None:
        """Until some more blocks may be held in memory. Raises what packing or storing failed with."""
        while self._failed is None and self._open is not None and self._open.frames_ahead > _FRAMES_AHEAD:
            await self._open.wait_for_frame()
        if self._failed is not None:
            raise self._failed
        if self._open is None:
            await self._packs.wait_for_place()

    def add(self, digest: bytes, block: memoryview) -> BlockRef:
        """Where this new block will be."""
        pack = self._open or self._begin()
        ref = pack.add(digest, block)
        self._packs.dedupe.claim(digest, ref)
        self.blocks += 1
        if ref.slot == FRAME_BLOCKS - 1 and pack.full:  # only by a frame more does it become so
            self.close_pack()
        return ref

    def let_go(self) -> None:
        """Whoever called `add` needs the memory of the blocks."""
        if self._open is not None:
            self._open.let_go()

    def close_pack(self) -> None:
        """Store the open pack as it is."""
        if self._open is not None:
            self._open.close()

    async def settle(self) -> None:
        """Until all that was added is stored. Raises what packing or storing failed with."""
        self.close_pack()
        while self._working:
            await asyncio.wait(self._working)
        if self._failed is not None:
            raise self._failed

    async def cancel(self) -> None:
        """Give up what is not stored yet."""
        self.close_pack()
        for task in self._working:
            task.cancel()
        while self._working:
            await asyncio.wait(self._working)

    def _begin(self) -> "_Pack":
        pack = self._open = _Pack(self, self._packs, secrets.token_bytes(SALT_SIZE), self._snapshot)
        self._packs.begin(pack.id, pack)
        task = asyncio.create_task(self._carry_out(pack))
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return pack

    def forget_open(self, pack: "_Pack") -> None:
        """That one takes no more blocks."""
        if self._open is pack:
            self._open = None

    async def _carry_out(self, pack: "_Pack") -> None:
        try:
            size_bytes = await pack.carry_out()
            self.stored_bytes += size_bytes  # not `+= await`, which adds to what it was before: packs overlap
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed = self._failed or error


class _Pack:
    """One pack on its way."""

    def __init__(self, packer: Packer, packs: PackStore, salt: bytes, snapshot: str) -> None:
        self.id = salt
        self.stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._packer = packer
        self._packs = packs
        self._snapshot = snapshot
        self._cipher = packs.repository.keys.frame_cipher(salt)
        self._writer = ObjectWriter(packs.repository.keys, salt)
        self._blocks: list[bytes | memoryview] = []
        """Of the frame that is being filled, one after the other; some may be joined."""
        self._digests: list[bytes] = []
        self._hashes: list[tuple[bytes, ...]] = []
        self._frames: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._taken_in = 0
        self._added = asyncio.Event()
        self._closed = False

    @property
    def frames_ahead(self) -> int:
        """Frames that are begun and not in the pack yet."""
        return len(self._hashes) - self._taken_in

    @property
    def full(self) -> bool:
        """With the frames under way it may pass PACK_SIZE, should they not shrink; an object takes none after that."""
        most = self._writer.size + self.frames_ahead * MAX_STORED_FRAME
        return most >= PACK_SIZE or len(self._hashes) >= MAX_OBJECT_FRAMES

    def add(self, digest: bytes, block: memoryview) -> BlockRef:
        ref = BlockRef(self.id, len(self._hashes), len(self._digests))
        self._blocks.append(block)
        self._digests.append(digest)
        if len(self._digests) == FRAME_BLOCKS:
            self._end_frame()
        return ref

    def let_go(self) -> None:
        """Keep a copy of the blocks of the frame that is not full yet, and not what they are parts of."""
        self._blocks = [b"".join(self._blocks)]

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._packer.forget_open(self)
            if self._digests:
                self._end_frame()
            self._frames.put_nowait(None)

    async def wait_for_frame(self) -> None:
        """Until one more frame is in the pack, or it failed."""
        self._added.clear()
        await self._added.wait()

    async def carry_out(self) -> int:
        """Take in the frames, store the object: its bytes."""
        entry = None
        try:
            while (frame := await self._frames.get()) is not None:
                stored = await frame
                self._writer.copy(self.id, self._snapshot, self._taken_in, stored, self._hashes[self._taken_in])
                self._taken_in += 1
                self._added.set()
            name, buffers, entry = await self._packs.in_thread(self._writer.finish)
            async with self._packs.uploading:
                await self._packs.repository.store.put(pack_key(name), buffers)
            self.stored.set_result(None)
            return entry.size
        finally:
            await self._end(entry)

    async def _end(self, entry: IndexEntry | None) -> None:
        self.close()
        while not self._frames.empty():
            frame = self._frames.get_nowait()
            if frame is not None:
                frame.cancel()
        if self.stored.done() and entry is not None:
            await self._packs.finish(self.id, (entry, self._hashes))
        else:
            self.stored.cancel()
            for digests in self._hashes:
                self._packs.dedupe.disown(self.id, digests)
            await self._packs.finish(self.id, None)
        self._added.set()

    def _end_frame(self) -> None:
        number, blocks = len(self._hashes), self._blocks
        self._hashes.append(tuple(self._digests))
        self._blocks, self._digests = [], []
        self._frames.put_nowait(asyncio.create_task(self._packs.in_thread(self._encode, number, blocks)))

    def _encode(self, number: int, blocks: Sequence[bytes | memoryview]) -> bytes:
        return self._cipher.encrypt(number, compress_frame(blocks, self._packs.level))
