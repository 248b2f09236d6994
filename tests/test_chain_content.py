"""Diff, statistics, adopt and key rotation, over real snapshots."""

import asyncio
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.domain import SnapshotId
from blockstore.errors import Conflict
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, TIB
from snapshotd.layout import quarantine_key
from snapshotd.memory_store import MemoryStore
from snapshotd.quarantine import encode_quarantine
from snapshotd.root import Root
from tests.chain_parts import Chain, blocks, chain_at, content, exported
from tests.snapshot_parts import CountingStore, snapshot_id

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
            for _ in range(5):  # the machine may stand still for seconds
                begun = time.monotonic()
                assert await _diff(chain, snapshot_id(1), snapshot_id(2)) == [(last * BLOCK_SIZE, BLOCK_SIZE, False)]
                assert sum(map(len, (await exported(chain)).values())) == 3 * BLOCK_SIZE
                assert await chain.verify() == {}
                await chain.prune()
                if (took_s := time.monotonic() - begun) < 5:
                    break
            assert took_s < 5

    asyncio.run(check())
