"""Diff, export, import, statistics, adopt and key rotation, over real snapshots."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.domain import SnapshotId
from blockstore.errors import Conflict, Corrupt, InvalidRequest, NotFound, OutOfRange, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, GIB, MIB, TIB
from snapshotd.compression import expand
from snapshotd.export import export
from snapshotd.frame import MAX_FRAME_CONTENT
from snapshotd.layout import quarantine_key
from snapshotd.memory_store import MemoryStore
from snapshotd.quarantine import encode_quarantine
from snapshotd.repository_objects import REPOSITORY_KEY, RepositoryObject, encode_repository
from snapshotd.root import Root
from tests.chain_parts import Chain, LocalCatalog, blocks, chain_at, content
from tests.snapshot_parts import CountingStore, snapshot_id
from tests.stack import until

SIZE = 8 * MIB
ZERO = bytes(BLOCK_SIZE)
NONE: Any = None


async def _diff(chain: Chain, before: str, after: str) -> list[tuple[int, int, bool]]:
    request = pb.DiffRequest(**{"from": before, "to": after})
    return [
        (each.offset, each.size, each.zero)
        async for response in chain.service.Diff(request, NONE)
        for each in response.ranges
    ]


def test_diff_of_what_was_written_zeroed_and_grown(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            first = await chain.snapshot(1, SIZE, blocks(range(100)))
            changes = {**blocks(range(10, 13), 5), 20: ZERO, 21: ZERO, **blocks(range(3000, 3001), 6)}
            await chain.snapshot(2, 2 * SIZE, changes, first)
            expected = [(10, 3, False), (20, 2, True), (3000, 1, False)]
            in_bytes = [(start * BLOCK_SIZE, count * BLOCK_SIZE, zero) for start, count, zero in expected]
            assert await _diff(chain, snapshot_id(1), snapshot_id(2)) == in_bytes
            assert await _diff(chain, snapshot_id(1), snapshot_id(1)) == []
            assert await _diff(chain, "", snapshot_id(1)) == [(0, 100 * BLOCK_SIZE, False)]
            back = await _diff(chain, snapshot_id(2), snapshot_id(1))
            assert back == [(10 * BLOCK_SIZE, 3 * BLOCK_SIZE, False), (20 * BLOCK_SIZE, 2 * BLOCK_SIZE, False)]

    asyncio.run(check())


def test_content_that_was_stored_twice_is_no_difference_and_reads_no_data(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with chain_at(tmp_path, store) as chain:
            await chain.snapshot(1, SIZE, blocks(range(300)))
            await chain.parts.packs.close()
            (tmp_path / "other").mkdir()
            # Another daemon, whose cache of hashes knows nothing: the same content comes into packs of its own.
            async with chain_at(tmp_path, store, chain.catalog) as same:
                same.parts.dedupe.forget(list(same.parts.dedupe.packs))
                await same.snapshot(2, SIZE, {**blocks(range(300)), 7: content(99)})
                assert len(await same.keys("packs")) == 2
                store.gets.clear()
                assert await _diff(same, snapshot_id(1), snapshot_id(2)) == [(7 * BLOCK_SIZE, BLOCK_SIZE, False)]
                packs = [key for key in store.gets if key.startswith("packs/")]
                assert len(packs) <= 4, "two trailers, each with its footer"

    asyncio.run(check())


async def _refs(chain: Chain, root: Root) -> list[Any]:
    shard = await chain.parts.reader.shard(root, 0)
    return shard.refs(0, 300) if shard else []


changes = st.dictionaries(st.integers(0, 300), st.integers(0, 12), max_size=30)


@settings(max_examples=20, deadline=None)
@given(before=changes, after=changes)
def test_diff_is_exactly_what_differs(tmp_path_factory: pytest.TempPathFactory, before: Any, after: Any) -> None:
    """Against two dictionaries; content 0 is zeroes."""

    def made(chosen: dict[int, int]) -> dict[int, bytes]:
        return {block: content(number) if number else ZERO for block, number in chosen.items()}

    async def check() -> None:
        async with chain_at(tmp_path_factory.mktemp("diff")) as chain:
            first = await chain.snapshot(1, SIZE, made(before))
            await chain.snapshot(2, SIZE, made(after), first if len(after) % 2 else None)
            new = {**before, **after} if len(after) % 2 else after
            expected = {
                block * BLOCK_SIZE: not new.get(block, 0)
                for block in range(301)
                if before.get(block, 0) != new.get(block, 0)
            }
            found = {}
            ranges = await _diff(chain, snapshot_id(1), snapshot_id(2))
            for offset, size, zero in ranges:
                found.update(dict.fromkeys(range(offset, offset + size, BLOCK_SIZE), zero))
            assert found == expected
            assert all(a[0] + a[1] < b[0] or a[2] != b[2] for a, b in pairwise(ranges))

    asyncio.run(check())


# ---- export


async def _export(chain: Chain, **request: Any) -> dict[int, bytes]:
    return {
        each.offset: each.data
        async for each in chain.service.Export(pb.ExportRequest(snapshot=snapshot_id(1), **request), NONE)
    }


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (5, 3 * BLOCK_SIZE), (BLOCK_SIZE * 90 + 1, MIB), (SIZE, 0)])
def test_export_gives_the_content_of_its_range(tmp_path: Path, offset: int, size: int) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, {**blocks(range(3, 100)), **blocks(range(700, 1300))})
            whole = await chain.parts.content(root)
            end = offset + size if size else SIZE
            image = bytearray(end - offset)
            last = offset
            for at, data in (await _export(chain, offset=offset, size=size)).items():
                assert last <= at <= at + len(data) <= end
                assert len(data) <= MIB
                image[at - offset : at - offset + len(data)] = data
                last = at + len(data)
            assert bytes(image) == whole[offset:end]

    asyncio.run(check())


async def _export_frames(chain: Chain, size_bytes: int) -> bytes:
    """The image that the frames of snapshot 1 make."""
    image = bytearray(size_bytes)
    request = pb.ExportRequest(snapshot=snapshot_id(1), frames=True)
    async for message in chain.service.Export(request, NONE):
        assert not message.data
        assert message.ByteSize() < 3 * MIB
        for frame in message.frames:
            unpacked = expand(frame.body, MAX_FRAME_CONTENT, "a frame")
            for block, slot, count in zip(frame.blocks, frame.slots, frame.counts, strict=True):
                part = unpacked[slot * BLOCK_SIZE : (slot + count) * BLOCK_SIZE]
                image[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE] = part
    return bytes(image)


def test_export_as_frames_gives_the_whole_content(tmp_path: Path) -> None:
    """Of several shards; with blocks that many places share, in no order, and frames of which little is needed."""
    chance = Random(3)
    shared = {block: content(number) for number, block in enumerate(chance.choices(range(40_000), k=300), 7)}
    again = {block: content(chance.randrange(7, 300)) for block in chance.sample(range(40_000), 200)}

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(2, 160 * MIB, shared)
            root = await chain.snapshot(1, 160 * MIB, {**blocks(range(900, 1500), 9), **again, 39_999: content(1)})
            assert await _export_frames(chain, root.size_bytes) == await chain.parts.content(root)

    asyncio.run(check())


def test_frames_that_lie_together_come_by_one_request(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with chain_at(tmp_path, store) as chain:
            await chain.snapshot(1, SIZE, blocks(range(2048)))
            store.gets.clear()
            await _export_frames(chain, SIZE)
            packs = [key for key in store.gets if key.startswith("packs/")]
            assert len(packs) == 32 / 8, "frames, so many in a message"

    asyncio.run(check())


def test_frames_that_a_prune_moved_are_found(tmp_path: Path) -> None:
    """By a daemon that another one pruned behind."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            deleted = await chain.snapshot(2, SIZE, blocks(range(640)))
            root = await chain.snapshot(1, SIZE, {**blocks(range(0, 640, 128)), **blocks(range(64, 192))})
            whole = await _export_frames(chain, SIZE)
            before = await chain.keys("packs")
            await chain.delete(deleted)
            (tmp_path / "other").mkdir()
            shutil.copy(tmp_path / "keyring", tmp_path / "other" / "keyring")
            async with chain_at(tmp_path / "other", chain.store, chain.catalog) as other:
                await other.prune()
            assert not before.keys() & (await chain.keys("packs")).keys()
            assert await _export_frames(chain, SIZE) == whole
            assert await chain.parts.content(root) == whole

    asyncio.run(check())


def test_a_damaged_frame_is_not_exported(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, blocks(range(512)))
            (key,) = await chain.keys("packs")
            stored = bytearray(await chain.parts.repository.store.get(key))
            stored[100] ^= 1
            await chain.parts.repository.store.put(key, bytes(stored))
            with pytest.raises(Corrupt, match="frame 0 of pack"):
                await _export_frames(chain, SIZE)

    asyncio.run(check())


def test_export_leaves_zeroes_out_and_bounds_what_it_reads_ahead(tmp_path: Path) -> None:
    async def check() -> None:
        store = CountingStore(MemoryStore())
        async with chain_at(tmp_path, store) as chain:
            root = await chain.snapshot(1, GIB, {**blocks(range(2048)), **blocks(range(200_000, 206_000), 3)})
            pieces = export(chain.parts.reader, root)
            store.gets.clear()
            await anext(pieces)
            frames = [key for key in store.gets if key.startswith("packs/")]
            await pieces.aclose()
            assert len(frames) <= 17 * 5, "16 pieces ahead of 4 frames each, and one to hand on"
            total = sum([len(piece.data) async for piece in export(chain.parts.reader, root)])
            assert total == 8048 * BLOCK_SIZE

    asyncio.run(check())


def test_export_refuses_what_is_out_of_range_unknown_or_damaged(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            with pytest.raises(NotFound):
                await _export(chain)
            await chain.snapshot(1, SIZE, blocks(range(100)))
            with pytest.raises(OutOfRange):
                await _export(chain, offset=SIZE, size=1)
            (pack,) = await chain.keys("packs")
            await chain.store.delete(pack)
            with pytest.raises(Corrupt):
                await _export(chain)

    asyncio.run(check())


# ---- import


async def _import(
    chain: Chain, size: int, chunks: list[tuple[int, bytes]], *, cut_off: bool = False, **first: Any
) -> pb.Snapshot:
    async def requests() -> AsyncIterator[pb.ImportRequest]:
        yield pb.ImportRequest(size_bytes=size, **first)
        for offset, data in chunks:
            yield pb.ImportRequest(offset=offset, data=data)
        if not cut_off:
            yield pb.ImportRequest(last=True)

    return await chain.service.Import(requests(), NONE)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 20_000)), max_size=12), st.integers(1, 3 * BLOCK_SIZE))
def test_an_imported_image_reads_back(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[tuple[int, int]], rest: int
) -> None:
    """Chunks of any size, with gaps of any size, in an image of any size."""
    image, chunks, at = bytearray(), [], 0
    for number, (gap, length) in enumerate(gaps):
        data = Random(number).randbytes(length)
        image += bytes(gap) + data
        chunks.append((at + gap, data))
        at += gap + length
    image += bytes(rest)

    async def check() -> None:
        async with chain_at(tmp_path_factory.mktemp("import")) as chain:
            snapshot = await _import(chain, len(image), chunks, description="mine", tags={"a": "b"})
            root = await chain.parts.reader.root(snapshot.id, snapshot.root)
            assert (await chain.parts.content(root))[: len(image)] == image
            assert snapshot.size_bytes == -(-len(image) // BLOCK_SIZE) * BLOCK_SIZE
            assert (root.description, dict(root.tags), root.volume) == ("mine", {"a": "b"}, "")
            assert SnapshotId(snapshot.id) in chain.catalog.control.records
            assert await chain.verify() == {}

    asyncio.run(check())


@pytest.mark.parametrize(
    ("chunks", "error"),
    [
        ([(100, b"a"), (50, b"b")], InvalidRequest),
        ([(SIZE - 1, b"ab")], OutOfRange),
        ([(SIZE + BLOCK_SIZE, b"")], None),
    ],
)
def test_an_import_that_makes_no_sense_leaves_no_snapshot(
    tmp_path: Path, chunks: list[tuple[int, bytes]], error: Any
) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            if error is None:
                assert (await _import(chain, SIZE, chunks)).size_bytes == SIZE
                return
            with pytest.raises(error):
                await _import(chain, SIZE, chunks)
            assert not await chain.keys("snapshots")
            assert not chain.catalog.control.records

    asyncio.run(check())


def test_an_import_that_was_cut_off_makes_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            with pytest.raises(InvalidRequest, match="cut off"):
                await _import(chain, SIZE, [(0, content(1))], cut_off=True)
            assert not await chain.keys("snapshots")

    asyncio.run(check())


def test_imports_that_stand_still_keep_nobody_from_storing(tmp_path: Path) -> None:
    """Each has a pack begun: more of them than may be in memory at once."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            never, standing = asyncio.Event(), []

            async def requests(seed: int) -> AsyncIterator[pb.ImportRequest]:
                yield pb.ImportRequest(size_bytes=64 * MIB)
                for number in range(8):
                    yield pb.ImportRequest(offset=number * MIB, data=Random(100 * seed + number).randbytes(MIB))
                standing.append(seed)
                await never.wait()

            stalled = [asyncio.ensure_future(chain.service.Import(requests(seed), NONE)) for seed in range(8)]
            await until(lambda: len(standing) >= 4, "as many stand still as there are places for packs")
            await asyncio.wait_for(chain.snapshot(1, SIZE, {number: content(number) for number in range(9)}), 30)
            for each in stalled:
                each.cancel()
            await asyncio.gather(*stalled, return_exceptions=True)
            assert await chain.verify() == {}

    asyncio.run(check())


def test_an_import_that_control_refuses_leaves_no_root(tmp_path: Path) -> None:
    class Refuses(LocalCatalog):
        async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
            raise InvalidRequest("no")

    async def check() -> None:
        async with chain_at(tmp_path, catalog=Refuses()) as chain:
            with pytest.raises(InvalidRequest):
                await _import(chain, SIZE, [(0, b"hello")])
            assert not await chain.keys("snapshots")
            await chain.prune()
            assert not await chain.keys("packs")

    asyncio.run(check())


def test_an_import_that_control_took_keeps_its_root_where_the_answer_is_lost(tmp_path: Path) -> None:
    class LosesAnswers(LocalCatalog):
        async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
            await super().add(snapshot, number)
            raise QuorumUnavailable("control does not answer")

    async def check() -> None:
        async with chain_at(tmp_path, catalog=LosesAnswers()) as chain:
            with pytest.raises(QuorumUnavailable, match="cairn store adopt"):
                await _import(chain, SIZE, [(0, b"hello")])
            ((name, record),) = chain.catalog.control.records.items()
            root = await chain.parts.reader.root(name, record.root)
            assert (await chain.parts.content(root)).startswith(b"hello")

    asyncio.run(check())


def test_nothing_is_imported_into_the_store_of_another_cluster(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            other = encode_repository(RepositoryObject(chain.parts.repository.id, "another cluster"))
            await chain.store.put(REPOSITORY_KEY, other)
            before = await chain.keys()
            with pytest.raises(Conflict, match="belongs to the cluster"):
                await _import(chain, SIZE, [(0, b"hello")])
            assert await chain.keys() == before

    asyncio.run(check())


def test_a_prune_beside_an_import_spares_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:

            async def requests() -> AsyncIterator[pb.ImportRequest]:
                yield pb.ImportRequest(size_bytes=64 * MIB)
                for number in range(40):
                    yield pb.ImportRequest(offset=number * MIB, data=Random(number).randbytes(MIB))
                    if number % 10 == 9:
                        await chain.prune()
                yield pb.ImportRequest(last=True)

            snapshot = await chain.service.Import(requests(), NONE)
            root = await chain.parts.reader.root(snapshot.id, snapshot.root)
            whole = await chain.parts.content(root)
            assert whole[39 * MIB : 40 * MIB] == Random(39).randbytes(MIB)
            assert await chain.verify() == {}

    asyncio.run(check())


# ---- statistics


def test_own_bytes_are_what_deleting_frees(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            first = await chain.snapshot(1, SIZE, blocks(range(256)))
            second = await chain.snapshot(2, SIZE, blocks(range(256, 512), 4), first)
            responses = [each async for each in chain.service.StoreStatistics(pb.StoreStatisticsRequest(), NONE)]
            found = responses[-1]
            usage = {each.snapshot: each for each in found.snapshots}
            assert found.stored_bytes == sum((await chain.keys()).values())
            assert found.objects == len(await chain.keys())
            assert found.unique_bytes == 512 * BLOCK_SIZE
            assert found.referenced_bytes == (256 + 512) * BLOCK_SIZE
            assert usage[second.snapshot].logical_bytes == 512 * BLOCK_SIZE
            assert usage[first.snapshot].shared_bytes == usage[second.snapshot].shared_bytes > 256 * BLOCK_SIZE * 0.9
            await chain.delete(second)
            before = sum((await chain.keys()).values())
            await chain.prune(repack_share=0.0001)
            freed = usage[second.snapshot].own_bytes - (before - sum((await chain.keys()).values()))
            assert abs(freed) < 20_000, "trailers, indexes and roots aside"

    asyncio.run(check())


# ---- adopt, rotate


def test_a_lost_catalog_comes_back_from_the_bucket(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            first = await chain.snapshot(1, SIZE, blocks(range(100)))
            await chain.snapshot(2, SIZE, blocks(range(5), 3), first)
            known = {name: each.root for name, each in chain.catalog.control.records.items()}
            bad = await chain.snapshot(3, SIZE, blocks(range(300, 400), 9))
            shard = f"shards/{bad.shards[0]}"
            await chain.store.delete(shard)
            chain.catalog.control.records.clear()
            responses = [each async for each in chain.service.Adopt(pb.AdoptRequest(), NONE)]
            assert list(responses[-1].snapshots) == [snapshot_id(1), snapshot_id(2)]
            assert [(each.object, list(each.snapshots)) for each in responses[-1].problems] == [(shard, [bad.snapshot])]
            assert {name: each.root for name, each in chain.catalog.control.records.items()} == known
            again = [each async for each in chain.service.Adopt(pb.AdoptRequest(), NONE)]
            assert not again[-1].snapshots

    asyncio.run(check())


def test_adopting_from_another_cluster_needs_force(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.parts.repository.take_over("one that is lost")
            with pytest.raises(Conflict, match="one that is lost"):
                _ = [each async for each in chain.service.Adopt(pb.AdoptRequest(), NONE)]
            _ = [each async for each in chain.service.Adopt(pb.AdoptRequest(force=True), NONE)]
            await chain.prune()

    asyncio.run(check())


def test_what_a_prune_is_about_to_delete_is_not_adopted(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(100)))
            pack = next(ref.pack for ref in await _refs(chain, root) if ref)
            stored = encode_quarantine(chain.parts.repository.keys, 77, [pack], bytes(16))
            await chain.store.put(quarantine_key(77), stored)
            chain.catalog.control.records.clear()
            responses = [each async for each in chain.service.Adopt(pb.AdoptRequest(), NONE)]
            assert "prune" in responses[-1].problems[0].message
            assert not chain.catalog.control.records

    asyncio.run(check())


def test_a_rotated_key_opens(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(10)))
            expected, keys = await chain.parts.content(root), set(await chain.keys("keys"))
            response = await chain.service.RotateKey(pb.RotateKeyRequest(), NONE)
            assert response.rewrapped == 1
            assert keys.isdisjoint(await chain.keys("keys"))
        async with chain_at(tmp_path, chain.store, chain.catalog) as again:
            assert (
                await again.parts.content(
                    await again.parts.reader.root(
                        root.snapshot, again.catalog.control.records[SnapshotId(root.snapshot)].root
                    )
                )
                == expected
            )

    asyncio.run(check())


# ---- size


def test_all_of_it_grows_with_the_data_and_not_with_the_volume(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            last = TIB // BLOCK_SIZE - 1
            first = await chain.snapshot(1, TIB, {0: content(1), last // 2: content(2), last: content(3)})
            await chain.snapshot(2, TIB, {last: content(4)}, first)
            begun = time.monotonic()
            assert await _diff(chain, snapshot_id(1), snapshot_id(2)) == [(last * BLOCK_SIZE, BLOCK_SIZE, False)]
            assert sum(map(len, (await _export(chain)).values())) == 3 * BLOCK_SIZE
            assert await chain.verify() == {}
            await chain.prune()
            assert time.monotonic() - begun < 5

    asyncio.run(check())
