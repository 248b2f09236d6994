"""Processes that write, read, delete and prune in one object store, interleaved by a seed (tests/chain_schedule.py).

Writers here follow the rules that snapshotd.prune states for them, with the real format and no more code than that
takes; blocks come from a few different contents, so that everybody refers to everybody's packs.
"""

import asyncio
import functools
from dataclasses import dataclass, field
from typing import Any

from blockstore.domain import SnapshotId
from blockstore.errors import CairnError, Fenced, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE
from snapshotd.crypto import DomainKeys
from snapshotd.frame import compress_frame
from snapshotd.index import Index, IndexEntry, encode_index
from snapshotd.inventory import load_quarantines, load_trailer, take_inventory
from snapshotd.layout import SNAPSHOTS, index_key, pack_key, root_key, shard_key
from snapshotd.manifest import MAX_DEPTH, SHARD_BLOCKS, BlockRef, Shard, encode_patch, encode_shard
from snapshotd.memory_store import MemoryStore
from snapshotd.pack import ObjectWriter
from snapshotd.prune import Pruner
from snapshotd.prune_plan import Marks, mark, merge_marks
from snapshotd.reader import SnapshotReader
from snapshotd.references import Manifests
from snapshotd.repository import Repository
from snapshotd.repository_objects import REPOSITORY_KEY, RepositoryObject, encode_repository
from snapshotd.root import Root, encode_root
from snapshotd.root_objects import roots_of
from tests.chain_schedule import Inline, MemoryControl, Record, Schedule, SteppedCatalog, SteppedStore

KEYS = DomainKeys(bytes(16), bytes(range(32)))
REPOSITORY = RepositoryObject("0" * 32, "cluster")
#: Blocks of a volume, in two shards.
BLOCKS = 12
SHARDS = 2
CONTENTS = 10


def block_of(content: int) -> bytes:
    """The bytes of one of the contents."""
    return bytes([content + 1]) * BLOCK_SIZE


def place_of(block: int) -> int:
    """The volume's blocks are the first ones of its shards."""
    return block % SHARDS * SHARD_BLOCKS + block // SHARDS


@dataclass
class World:
    """All that there is. pruner: the class that prunes; broken ones are put in here."""

    schedule: Schedule
    pruner: type[Pruner] = Pruner
    store: MemoryStore = field(default_factory=MemoryStore)
    control: MemoryControl = field(default_factory=MemoryControl)
    written: int = 0

    def parts(self, name: str) -> tuple[Repository, SteppedCatalog]:
        """What a new process has."""
        process = self.schedule.process(name)
        store = SteppedStore(self.store, self.schedule, process)
        repository = Repository(store, KEYS, REPOSITORY, bytes(range(32)))
        return repository, SteppedCatalog(self.control, self.schedule, process)

    def random_bytes(self, count: int) -> bytes:
        return self.schedule.random.randbytes(count)

    # ---- processes

    async def write(self, name: str) -> None:
        """Write some snapshots, one after the other, most as a change of an earlier one."""
        repository, catalog = self.parts(name)
        for _ in range(self.schedule.random.randint(1, 3)):
            pending = [each for each in self.control.records if self._is_pending(each)]
            if pending and self.schedule.random.random() < 0.4:
                # Control gives it to this one as well: who does it was silent for a while.
                writer = Writer(self, repository, catalog, self.schedule.random.choice(sorted(pending)))
            else:
                writer = Writer(self, repository, catalog)
            try:
                await writer.run()
            except Superseded:
                continue

    def _is_pending(self, snapshot: SnapshotId) -> bool:
        record = self.control.records.get(snapshot)
        return record is not None and record.state == pb.SNAPSHOT_STATE_PENDING

    async def prune(self, name: str) -> None:
        """Prune twice; who is fenced tries again, as a person would."""
        repository, catalog = self.parts(name)
        for _ in range(2):
            share = self.schedule.random.choice([0.01, 0.4, 0.9])
            pruner = self.pruner(repository, catalog, share, random=self.random_bytes)
            try:
                async for _ in pruner.run(dry_run=False):
                    pass
            except (Fenced, NotFound):
                continue

    async def delete(self, name: str) -> None:
        """Delete some snapshots, as control and a daemon do."""
        repository, catalog = self.parts(name)
        for _ in range(3):
            await catalog.roots()
            records = self.control.records
            done = sorted(each for each in records if records[each].state == pb.SNAPSHOT_STATE_COMPLETED)
            if not done:
                continue
            snapshot = self.schedule.random.choice(done)
            records[snapshot].state = pb.SNAPSHOT_STATE_DELETING
            await catalog.roots()
            if not self.control.is_base(snapshot):
                for root in await roots_of(repository.store, snapshot):
                    await repository.store.delete(root.key)
                await catalog.call(functools.partial(self.control.forget, snapshot))

    async def read(self, name: str) -> None:
        """Read snapshots whole while all that goes on."""
        repository, catalog = self.parts(name)
        reader = SnapshotReader(repository, 1 << 20)
        for _ in range(10):
            completed = sorted((await catalog.roots()).completed)
            if completed:
                await self.check(reader, self.schedule.random.choice(completed))
                # Its index is an old one then, and it has none of the frames.
                reader = SnapshotReader(repository, 1 << 20, reader.index)

    async def check(self, reader: SnapshotReader, snapshot: SnapshotId) -> None:
        """It reads back exactly, or was deleted meanwhile."""
        record = self.control.records.get(snapshot)
        if record is None or record.state != pb.SNAPSHOT_STATE_COMPLETED:
            return
        try:
            found = await read_back(reader, snapshot, record.root)
        except CairnError as error:
            if record.state == pb.SNAPSHOT_STATE_COMPLETED:
                raise AssertionError(f"{snapshot} does not read back: {error}") from error
            return
        assert found == dict(record.content), f"{snapshot} reads back as something else"


async def read_back(reader: SnapshotReader, snapshot: str, digest: bytes) -> dict[int, int]:
    """Which content each block has."""
    root = await reader.root(snapshot, digest)
    found = {}
    for block in range(BLOCKS):
        _, payload = await reader.read(root, place_of(block), 1)
        if payload:
            assert payload == bytes([payload[0]]) * BLOCK_SIZE
            found[block] = payload[0] - 1
    return found


class Superseded(Exception):
    """Another writer completed the snapshot, and it may have been deleted since."""


class Writer:
    """Writes one snapshot by the rules. snapshot: one that another writer has begun; a new one where it is empty."""

    def __init__(
        self, world: World, repository: Repository, catalog: SteppedCatalog, snapshot: SnapshotId | None = None
    ) -> None:
        if snapshot is None:
            world.written += 1
        self.snapshot = snapshot or SnapshotId(f"snap-{world.written:017x}")
        self._is_new = snapshot is None
        self._world = world
        self._repository = repository
        self._catalog = catalog
        self._random = world.schedule.random
        self._number = 0
        self._marks: Marks = frozenset()
        self._stored: dict[int, BlockRef] = {}
        """By content, where it may be referred to."""
        self._places: dict[int, BlockRef | None] = {}
        """Of the blocks that this snapshot changes."""
        self._base: Root | None = None
        self._shards: dict[int, str] = {}

    async def run(self) -> None:
        record = await self._catalog.call(self._begin)
        try:
            await self._carry_out(record)
        except (CairnError, KeyError):
            # Once another writer completed it, what this one refers to may be gone.
            self._check_pending()
            raise

    def _check_pending(self) -> None:
        record = self._world.control.records.get(self.snapshot)
        if record is None or record.state != pb.SNAPSHOT_STATE_PENDING:
            raise Superseded

    async def _carry_out(self, record: Record) -> None:
        await self._look()
        if record.base:
            self._base = await self._read_base(SnapshotId(record.base))
            self._shards = dict(self._base.shards)
        await self._put(self._changes(record))
        while True:
            await self._write_shards()
            digest = await self._write_root()
            try:
                complete = functools.partial(self._world.control.complete, self.snapshot, digest, self._number)
                await self._catalog.call(complete)
                return
            except Fenced:
                self._check_pending()
                await self._look()
                await self._mend(record)

    def _begin(self) -> Record:
        """One transaction: the base stays until this one is completed."""
        records = self._world.control.records
        if not self._is_new:
            self._check_pending()
            return records[self.snapshot]
        bases = sorted(name for name, each in records.items() if each.state == pb.SNAPSHOT_STATE_COMPLETED)
        base = self._random.choice(bases) if bases and self._random.random() < 0.6 else ""
        content = dict(records[SnapshotId(base)].content) if base else {}
        changed = self._random.sample(range(BLOCKS), self._random.randint(1, BLOCKS))
        for block in changed:
            content[block] = self._random.randrange(CONTENTS)
            if self._random.random() < 0.2:
                del content[block]
        record = records[self.snapshot] = Record(pb.SNAPSHOT_STATE_PENDING, content, base=base)
        return record

    def _changes(self, record: Record) -> list[int]:
        before = self._world.control.records[SnapshotId(record.base)].content if record.base else {}
        return [block for block in range(BLOCKS) if before.get(block) != record.content.get(block)]

    async def _read_base(self, base: SnapshotId) -> Root:
        record = self._world.control.records[base]
        return await Manifests(self._repository).root(base, record.root)

    async def _look(self) -> None:
        """The number, then the quarantines, then what is there."""
        self._number = await self._catalog.prune_number()
        self._marks = merge_marks((await load_quarantines(self._repository)).values())
        inventory = await take_inventory(self._repository)
        self._stored = {}
        void = inventory.replaced
        for name, entry in inventory.entries.items():
            if name in void or name in inventory.orphans:
                continue
            try:
                trailer = await load_trailer(self._repository, name, entry.size)
            except NotFound:
                continue
            for part, of_frames in zip(trailer.parts, trailer.hashes, strict=True):
                for frame, hashes in zip(part.numbers, of_frames, strict=True):
                    for slot, digest in enumerate(hashes):
                        if part.pack not in self._marks:
                            self._stored[_CONTENT_OF[digest]] = BlockRef(part.pack, frame, slot)
        self._present = {name for name in inventory.shards if mark(name) not in self._marks}

    async def _put(self, blocks: list[int]) -> None:
        """Give these blocks a place: where their content is stored, or in new packs."""
        content = self._world.control.records[self.snapshot].content
        new = sorted({content[block] for block in blocks if block in content} - self._stored.keys())
        entries = []
        for at in range(0, len(new), 4):
            entries.append(await self._put_pack(new[at : at + 4]))
        if entries:
            name, stored = encode_index(KEYS, Index(tuple(entries)), self._world.random_bytes(16))
            await self._repository.store.put(index_key(name), stored)
        for block in blocks:
            self._places[block] = self._stored[content[block]] if block in content else None

    async def _put_pack(self, contents: list[int]) -> IndexEntry:
        """A pack of frames of two blocks, so that a part of it may die."""
        pack = self._world.random_bytes(16)
        writer, cipher = ObjectWriter(KEYS, pack), KEYS.frame_cipher(pack)
        refs: dict[int, BlockRef] = {}
        for at in range(0, len(contents), 2):
            part = contents[at : at + 2]
            blocks = [block_of(each) for each in part]
            number = at // 2
            stored = cipher.encrypt(number, compress_frame(blocks))
            writer.copy(pack, self.snapshot, number, stored, [KEYS.block_hash(block) for block in blocks])
            refs |= {each: BlockRef(pack, number, slot) for slot, each in enumerate(part)}
        name, buffers, entry = writer.finish()
        await self._repository.store.put(pack_key(name), buffers)
        self._stored |= refs
        return entry

    async def _write_shards(self) -> None:
        manifests = Manifests(self._repository)
        for number in range(SHARDS):
            changes = {
                place_of(block) % SHARD_BLOCKS: ref
                for block, ref in self._places.items()
                if place_of(block) // SHARD_BLOCKS == number
            }
            below = self._base.shards.get(number) if self._base else None
            if not changes:
                continue
            loaded = await manifests.shard(below) if below else None
            shard = loaded.shard.copy() if loaded else Shard()
            shard.apply(changes)
            self._shards.pop(number, None)
            if not len(shard):
                continue
            if loaded and below and len(loaded.names) < MAX_DEPTH and self._random.random() < 0.7:
                name, stored = encode_patch(KEYS, below, len(loaded.names), changes, self._world.random_bytes(16))
            else:
                name, stored = encode_shard(KEYS, shard, self._world.random_bytes(16))
            await self._repository.store.put(shard_key(name), stored)
            self._shards[number] = name

    async def _write_root(self) -> bytes:
        root = Root(self.snapshot, "", "", SHARDS * SHARD_BLOCKS * BLOCK_SIZE, shards=dict(self._shards))
        stored, digest = encode_root(KEYS, root, self._world.random_bytes(16))
        await self._repository.store.put(root_key(self.snapshot, digest), stored)
        return digest

    async def _mend(self, record: Record) -> None:
        """What was put and is quarantined or gone is put again; shards and root are written anew in any case."""
        safe = set(self._stored.values())
        lost = [block for block, ref in self._places.items() if ref is not None and ref not in safe]
        await self._put(lost)


_CONTENT_OF = {KEYS.block_hash(block_of(content)): content for content in range(CONTENTS)}


async def simulate(seed: int, pruner: type[Pruner] = Pruner, *, crashes: float = 0.002) -> World:
    """One run, checked in the end. Raises AssertionError where something was lost, or left for ever."""
    asyncio.get_running_loop().set_default_executor(Inline())
    world = World(Schedule(seed, crashes), pruner)
    await world.store.put(REPOSITORY_KEY, encode_repository(REPOSITORY))
    await _run(world, [world.write("steady writer 1"), world.write("steady writer 2")])
    await _run(world, [world.delete("steady deleter")])
    work = [world.write(f"writer {number}") for number in range(world.schedule.random.randint(2, 5))]
    work += [world.prune(f"pruner {number}") for number in range(world.schedule.random.randint(1, 5))]
    work += [world.read("steady reader 1"), world.read("steady reader 2"), world.delete("deleter")]
    await _run(world, work)
    await check_end(world)
    return world


async def _run(world: World, work: list[Any]) -> None:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await world.schedule.run(tasks)
    finally:
        for task in tasks:
            task.cancel()
        for process in world.schedule.processes:
            process.crashed = True
            for turn in process.waiting:
                turn.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def check_end(world: World) -> None:
    """Everything reads back; a prune that nobody disturbs keeps it so; and once all is deleted, nothing is left."""
    world.schedule.crashes, world.pruner = 0.0, Pruner
    await _run(world, [read_all(world)])
    records = world.control.records
    for name in [name for name, each in records.items() if each.state == pb.SNAPSHOT_STATE_PENDING]:
        world.control.forget(name)  # its writer crashed, and maybe its root arrives behind the deletion
    await _run(world, [world.prune("steady pruner")])
    left = [info.key async for info in world.store.list(SNAPSHOTS) if info.key[len(SNAPSHOTS) :][:22] not in records]
    assert not left, f"{left} are of deleted snapshots, and left for ever"
    await _run(world, [read_all(world)])
    for name in records:
        assert len(await roots_of(world.store, name)) <= 1, f"roots of {name} are left for ever"
    async for info in world.store.list(SNAPSHOTS):
        await world.store.delete(info.key)
    records.clear()
    for _ in range(2):
        await _run(world, [world.prune("steady pruner")])
    left = [info.key async for info in world.store.list() if info.key.startswith(("packs/", "shards/", "quarantine/"))]
    assert not left, f"{len(left)} objects are left for ever, such as {left[0]}"


async def read_all(world: World) -> None:
    repository, _ = world.parts("steady reader")
    reader = SnapshotReader(repository, 1 << 20)
    for snapshot in sorted(world.control.records):
        await world.check(reader, snapshot)
