"""The parts of snapshotd around one object store, as its daemon makes them; a store that counts and can fail."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from blockstore.domain import make_id
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.dedupe import Dedupe
from snapshotd.keyring import FileKeyring
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import Data, ObjectStore, size_of
from snapshotd.pack_index import PackIndex
from snapshotd.pack_store import PackStore
from snapshotd.reader import SnapshotReader
from snapshotd.repository import Repository, open_repository
from snapshotd.root import Root
from snapshotd.wrapped_store import WrappedStore
from snapshotd.writer import SnapshotWriter

CLUSTER = "a cluster"
VOLUME = make_id("vol", bytes(9))


def snapshot_id(number: int) -> str:
    return make_id("snap", (number << 4).to_bytes(9, "big"))


class CountingStore(WrappedStore):
    """What was asked of a store, by kind and key. `before_put` may raise, or wait."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self.inner = inner
        self.puts: list[tuple[str, int]] = []
        self.gets: list[str] = []
        self.before_put: Callable[[str], None] = lambda key: None

    async def get(self, key: str) -> bytes:
        self.gets.append(key)
        return await super().get(key)

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        self.gets.append(key)
        return await super().get_range(key, start, length)

    async def put(self, key: str, data: Data, *, if_absent: bool = False) -> bool:
        self.before_put(key)
        done = await super().put(key, data, if_absent=if_absent)
        self.puts.append((key, size_of(data)))
        return done

    def put_bytes(self, prefix: str) -> int:
        """Bytes put under keys that begin so."""
        return sum(size for key, size in self.puts if key.startswith(prefix))


class Parts:
    """Of one process. `restart` makes those of the next one, with the same store and the same cache of hashes."""

    def __init__(self, repository: Repository, state: Path, uploads: int = 2, cache_bytes: int = 16 * MIB) -> None:
        self.repository = repository
        self.index = PackIndex(repository)
        self.dedupe = Dedupe(state / "hashes", repository.id.encode())
        self.packs = PackStore(repository, self.index, self.dedupe, uploads, 3)
        self.reader = SnapshotReader(repository, cache_bytes, self.index)

    async def snapshot(
        self, number: int, size_bytes: int, changes: dict[int, bytes], base: Root | None = None
    ) -> tuple[Root, bytes]:
        """Write a snapshot that differs from its base in `changes`, by block number: (root, its SHA-256)."""
        writer = SnapshotWriter(self.packs, self.reader, snapshot_id(number), size_bytes, base)
        for block, content in sorted(changes.items()):
            await writer.put_blocks(block, content)
        await writer.settle()
        return await writer.finish(facts(number, size_bytes))

    async def content(self, root: Root) -> bytes:
        """All of a snapshot, zeroes included."""
        content = bytearray(root.blocks * BLOCK_SIZE)
        for start in range(0, root.blocks, 256):
            count = min(256, root.blocks - start)
            mapped, payload = await self.reader.read(root, start, count)
            at = 0
            for block in range(count):
                if mapped[block >> 3] >> (block & 7) & 1:
                    content[(start + block) * BLOCK_SIZE : (start + block + 1) * BLOCK_SIZE] = payload[
                        at : at + BLOCK_SIZE
                    ]
                    at += BLOCK_SIZE
            assert at == len(payload)
        return bytes(content)


def facts(number: int, size_bytes: int) -> Root:
    return Root(snapshot=snapshot_id(number), volume=VOLUME, volume_name="a volume", size_bytes=size_bytes)


@asynccontextmanager
async def opened(directory: Path, store: ObjectStore | None = None, uploads: int = 2) -> AsyncIterator[Parts]:
    """The parts over `store` (default: memory), with a keyring and a cache of hashes in `directory`."""
    keyring = await asyncio.to_thread(FileKeyring, directory / "keyring", create=not (directory / "keyring").exists())
    repository = await open_repository(store or MemoryStore(), keyring, CLUSTER, create=True)
    parts = Parts(repository, directory, uploads)
    try:
        yield parts
    finally:
        await parts.packs.close()
