"""Snapshots written and read back: against a volume that is a bytearray, through crashes, and counted to the byte."""

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.errors import Corrupt, InvalidRequest, OutOfRange, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, GIB, MIB, TIB
from blockstore.volume.changes import Run
from snapshotd.layout import shard_key
from snapshotd.manifest import MAX_DEPTH, SHARD_BLOCKS
from snapshotd.memory_store import MemoryStore
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root
from snapshotd.writer import SnapshotWriter
from tests.plain_reader import PlainReader
from tests.snapshot_parts import CountingStore, Parts, facts, opened, snapshot_id

ZEROES = bytes(BLOCK_SIZE)


def block(seed: int) -> bytes:
    """A block that no other seed has, half of which does not compress."""
    return Random(seed).randbytes(BLOCK_SIZE // 2) + bytes(BLOCK_SIZE // 2)


def blocks(count: int, seed: int = 0) -> dict[int, bytes]:
    return {number: block(seed * 1_000_000 + number) for number in range(count)}


async def plain_content(parts: Parts, store: MemoryStore, root: Root) -> dict[int, bytes]:
    """By the reader that shares no code."""
    bucket = {info.key: await store.get(info.key) async for info in store.list()}
    keys = parts.repository.keys
    return dict(PlainReader(bucket, keys.domain, keys._data_key).blocks(root.snapshot))


# ---- against a model

contents = st.one_of(st.just(ZEROES), st.integers(0, 30).map(block))
starts = st.one_of(st.integers(0, 90), st.integers(SHARD_BLOCKS - 3, SHARD_BLOCKS + 3))
writes = st.tuples(starts, st.lists(contents, min_size=1, max_size=6))
MODEL_BLOCKS = SHARD_BLOCKS + 100


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.lists(writes, max_size=8), st.booleans()), min_size=1, max_size=5))
def test_every_snapshot_reads_back_exactly(steps: list[tuple[list[tuple[int, list[bytes]]], bool]]) -> None:
    """Snapshots of a volume that is written at random, each a change of the last; sometimes by a new process."""

    async def check(directory: Path) -> None:
        store = MemoryStore()
        volume: dict[int, bytes] = {}
        base: Root | None = None
        expected: list[tuple[Root, dict[int, bytes]]] = []
        for number, (changes, restart) in enumerate(steps):
            async with opened(directory, store) as parts:
                dirty = {start + at: each for start, run in changes for at, each in enumerate(run)}
                volume |= dirty
                base, digest = await parts.snapshot(number, MODEL_BLOCKS * BLOCK_SIZE, dirty, base)
                shown = {at: each for at, each in volume.items() if each != ZEROES}
                expected.append((base, shown))
                assert base.statistics.logical_bytes == len(shown) * BLOCK_SIZE
                assert await parts.reader.root(base.snapshot, digest) == base
            if restart:
                (directory / "hashes").unlink()
        async with opened(directory, store) as parts:
            for root, shown in expected:
                assert await mapped_blocks(parts, root) == shown
                assert await plain_content(parts, store, root) == shown

    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(check(Path(directory)))


async def mapped_blocks(parts: Parts, root: Root) -> dict[int, bytes]:
    """What a snapshot maps, by block number."""
    found: dict[int, bytes] = {}
    for start in range(0, root.blocks, 4096):
        count = min(4096, root.blocks - start)
        mapped, payload = await parts.reader.read(root, start, count)
        numbers = [start + at for at in range(count) if mapped[at >> 3] >> (at & 7) & 1]
        assert len(payload) == len(numbers) * BLOCK_SIZE
        found |= {each: payload[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE] for at, each in enumerate(numbers)}
    return found


# ---- what is stored


def test_what_is_there_is_not_stored_again(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            content = blocks(300)
            first, _ = await parts.snapshot(1, 4 * MIB, content)
            assert first.statistics.changed_bytes == first.statistics.logical_bytes == 300 * BLOCK_SIZE
            assert 300 * BLOCK_SIZE // 2 < first.statistics.stored_bytes < 300 * BLOCK_SIZE * 0.6
            packs = store.put_bytes("packs/")
            moved = {number + 400: each for number, each in content.items()}
            second, _ = await parts.snapshot(2, 4 * MIB, moved)
            assert store.put_bytes("packs/") == packs
            assert second.statistics.deduplicated_bytes == second.statistics.changed_bytes == 300 * BLOCK_SIZE
            assert await mapped_blocks(parts, second) == moved

    asyncio.run(check())


def test_two_snapshots_at_once_store_what_they_have_in_common_once(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            content = blocks(2000)
            (one, _), (two, _) = await asyncio.gather(
                parts.snapshot(1, 8 * MIB, content), parts.snapshot(2, 8 * MIB, content)
            )
            assert store.put_bytes("packs/") < 2000 * BLOCK_SIZE * 0.6
            assert await mapped_blocks(parts, one) == await mapped_blocks(parts, two) == content

    asyncio.run(check())


def test_zeroes_cost_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            root, _ = await parts.snapshot(1, 4 * MIB, dict.fromkeys(range(1000), ZEROES))
            assert (root.shards, root.statistics.logical_bytes) == ({}, 0)
            assert {key.split("/")[0] for key, _ in store.puts} == {"repository", "keys", "snapshots"}

    asyncio.run(check())


def test_a_small_change_writes_a_patch_and_shares_the_rest(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            content = {number: block(number) for start in (0, SHARD_BLOCKS) for number in range(start, start + 600)}
            root, _ = await parts.snapshot(1, 256 * MIB, content)
            depths = []
            for step in range(MAX_DEPTH + 2):
                base = root
                content[step] = block(10_000 + step)
                root, _ = await parts.snapshot(2 + step, 256 * MIB, {step: content[step]}, base)
                assert root.shards[1] == base.shards[1]
                depths.append((await parts.reader.stored_shard(root.shards[0])).depth)
                assert root.statistics.stored_bytes < BLOCK_SIZE * 20
            assert depths == [*range(1, MAX_DEPTH + 1), 0, 1]
            assert await mapped_blocks(parts, root) == content

    asyncio.run(check())


def test_what_did_not_change_after_all_costs_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as parts:
            content = blocks(100)
            base, _ = await parts.snapshot(1, 4 * MIB, content)
            again, _ = await parts.snapshot(2, 4 * MIB, content, base)
            assert again.shards == base.shards
            assert again.statistics.changed_bytes == again.statistics.stored_bytes == 0

    asyncio.run(check())


def test_packs_have_about_16_mib(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), 64 * MIB)
            for start in range(0, 64 * 256, 256):
                await writer.put_blocks(start, Random(start).randbytes(MIB))
            await writer.settle()
            sizes = sorted(size for key, size in store.puts if key.startswith("packs/"))
            assert len(sizes) == 4
            assert all(13 * MIB < size < 16.5 * MIB for size in sizes)

    asyncio.run(check())


# ---- crashes and failures


@pytest.mark.parametrize("fails_at", ["packs/", "index/", "shards/", "snapshots/"])
def test_a_process_that_died_uploads_nothing_twice(tmp_path: Path, fails_at: str) -> None:
    """It dies at the first put under that folder, or the third of packs; the next one goes on."""

    async def check() -> None:
        inner = MemoryStore()
        content = {number: Random(number).randbytes(BLOCK_SIZE) for number in range(12_000)}
        first = CountingStore(inner)
        first.before_put = failing(fails_at, after=2 if fails_at == "packs/" else 0)
        with pytest.raises(QuorumUnavailable):
            async with opened(tmp_path, first) as parts:
                await parts.snapshot(1, 64 * MIB, content)
        second = CountingStore(inner)
        async with opened(tmp_path, second) as parts:
            await parts.packs.look(snapshot_id(1))
            root, _ = await parts.snapshot(1, 64 * MIB, content)
            assert await mapped_blocks(parts, root) == content
        stored = first.put_bytes("packs/") + second.put_bytes("packs/")
        assert 12_000 * BLOCK_SIZE < stored < 12_000 * BLOCK_SIZE * 1.02

    asyncio.run(check())


def failing(folder: str, after: int) -> Callable[[str], None]:
    """Raises at each put in `folder` after so many."""
    seen: list[str] = []

    def before_put(key: str) -> None:
        if key.startswith(folder):
            seen.append(key)
            if len(seen) > after:
                raise QuorumUnavailable(f"the store does not take {key}")

    return before_put


def test_a_pack_that_was_not_stored_is_found_by_nobody(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            store.before_put = failing("packs/", after=0)
            with pytest.raises(QuorumUnavailable):
                await parts.snapshot(1, 4 * MIB, blocks(50))
            store.before_put = lambda key: None
            root, _ = await parts.snapshot(2, 4 * MIB, blocks(50))
            assert await mapped_blocks(parts, root) == blocks(50)
            assert root.statistics.deduplicated_bytes == 0

    asyncio.run(check())


def test_whoever_shares_a_pack_that_is_given_up_fails_too(tmp_path: Path) -> None:
    """And finds nothing of it when it tries again."""

    async def check() -> None:
        async with opened(tmp_path) as parts:
            maker = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), 4 * MIB)
            await maker.put_blocks(0, block(1) * 3)
            await maker._place_all()
            sharer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(2), 4 * MIB)
            await sharer.put_blocks(0, block(1))
            await sharer._place_all()
            await maker.cancel()
            with pytest.raises(QuorumUnavailable, match="is not stored"):
                await sharer.settle()
            await sharer.cancel()
            root, _ = await parts.snapshot(2, 4 * MIB, {0: block(1)})
            assert await mapped_blocks(parts, root) == {0: block(1)}

    asyncio.run(check())


def test_a_frame_that_was_not_repacked_is_no_place_for_a_block(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as parts:
            await parts.snapshot(1, 4 * MIB, blocks(80))
            (pack,) = {part.pack for entry in parts.index.present() for part in entry.parts}
            await parts.packs.indexed({pack: {0, 1}})
            with pytest.raises(QuorumUnavailable, match="is not stored"):
                await parts.packs.indexed({pack: {0, 2}})

    asyncio.run(check())


def test_a_patch_on_a_shard_that_a_prune_took_is_written_again(tmp_path: Path) -> None:
    async def check() -> None:
        store = MemoryStore()
        async with opened(tmp_path, store) as parts:
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), 16 * MIB)
            await writer.put_blocks(0, b"".join(blocks(2000).values()))
            await writer.settle()
            below = writer.shards[0]
            await writer.put_blocks(3000, block(5000))
            await writer.settle()
            assert (await parts.reader.stored_shard(writer.shards[0])).base == below
            await store.delete(shard_key(below))
            await writer.mend_shards(frozenset())
            root, _ = await writer.finish(facts(1, 16 * MIB))
            assert await plain_content(parts, store, root) == blocks(2000) | {3000: block(5000)}

    asyncio.run(check())


@pytest.mark.parametrize("of_base", [False, True])
def test_a_shard_that_a_prune_took_before_it_changed_again(tmp_path: Path, of_base: bool) -> None:
    """One that was written here is reason to try again; one of the base is damage, which no other attempt mends."""

    async def check() -> None:
        store = MemoryStore()
        async with opened(tmp_path, store) as parts:
            root, _ = await parts.snapshot(1, 16 * MIB, blocks(200))
            parts.reader = SnapshotReader(parts.repository, MIB, parts.index)
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(2), 16 * MIB, root)
            if not of_base:
                await writer.put_blocks(3000, block(5000))
                await writer.settle()
            await store.delete(shard_key(writer.shards[0]))
            await writer.put_blocks(3001, block(5001))
            with pytest.raises(Corrupt if of_base else QuorumUnavailable, match="gone"):
                await writer.settle()
            await writer.cancel()

    asyncio.run(check())


def test_blocks_in_quarantine_are_put_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as parts:
            await parts.snapshot(1, 4 * MIB, blocks(80))
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(2), 4 * MIB)
            await writer.put_blocks(7, b"".join(blocks(80).values()) + block(1000))
            await writer.settle()
            old = {part.pack for entry in parts.index.present() for part in entry.parts if len(part) == 2}
            assert await writer.stale_runs(frozenset()) == []
            assert await writer.stale_runs(old) == [Run(7, 80)]
            writer.shunned = old
            await writer.put_blocks(7, b"".join(blocks(80).values()))
            await writer.settle()
            assert await writer.stale_runs(old) == []
            root, _ = await writer.finish(facts(2, 4 * MIB))
            assert await mapped_blocks(parts, root) == {at + 7: each for at, each in blocks(80).items()} | {
                87: block(1000)
            }

    asyncio.run(check())


def test_a_root_never_replaces_another(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as parts:
            first = await parts.snapshot(1, MIB, blocks(3))
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), MIB)
            await writer.settle()
            second = await writer.finish(facts(1, MIB))
            for root, digest in (first, second):
                assert await parts.reader.root(snapshot_id(1), digest) == root
            assert first[1] != second[1]

    asyncio.run(check())


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with opened(tmp_path) as parts:
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), MIB)
            with pytest.raises(InvalidRequest):
                await writer.put_blocks(0, b"short")
            with pytest.raises(InvalidRequest):
                await writer.put_runs([Run(0, 2)], ZEROES)
            with pytest.raises(OutOfRange):
                await writer.put_blocks(256, ZEROES)

    asyncio.run(check())


# ---- size


def test_a_large_volume_costs_what_its_data_costs(tmp_path: Path) -> None:
    """64 MiB in 1 TiB: objects, requests and bytes grow with the data."""

    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with opened(tmp_path, store) as parts:
            writer = SnapshotWriter(parts.packs, parts.reader, snapshot_id(1), TIB)
            places = [number * (16 * GIB // BLOCK_SIZE) for number in range(64)]
            for place in places:
                await writer.put_blocks(place, Random(place).randbytes(MIB))
            await writer.settle()
            root, _ = await writer.finish(facts(1, TIB))
            assert len(root.shards) == 64
            manifest = store.put_bytes("shards/") + store.put_bytes("index/") + store.put_bytes("snapshots/")
            assert manifest < 64 * 400 + 16_384
            store.gets.clear()
            mapped, payload = await parts.reader.read(root, places[40] - 10, 20)
            assert (mapped, payload) == (b"\x00\xfc\x0f", Random(places[40]).randbytes(MIB)[: 10 * BLOCK_SIZE])
            assert len(store.gets) == 2

    asyncio.run(check())
