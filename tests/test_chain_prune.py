"""Prune over real snapshots: what goes, what stays, what is repacked, and who is refused."""

import asyncio
from pathlib import Path

import pytest

from blockstore.domain import SnapshotId
from blockstore.errors import Conflict, Corrupt, Fenced, InvalidRequest
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.layout import root_key
from snapshotd.prune import Pruner
from snapshotd.reader import SnapshotReader
from tests.chain_parts import Chain, blocks, chain_at
from tests.chain_schedule import Record
from tests.snapshot_parts import VOLUME, snapshot_id

SIZE = 8 * MIB


def test_a_deleted_snapshot_leaves_and_the_others_stay(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            kept = await chain.snapshot(1, SIZE, blocks(range(300)))
            gone = await chain.snapshot(2, SIZE, blocks(range(400, 900), 7))
            expected = await chain.parts.content(kept)
            before = await chain.keys()
            await chain.delete(gone)
            plan = (await chain.prune())[-1]
            assert plan.done
            after = await chain.keys()
            freed = sum(before.values()) - sum(after.values())
            assert freed > 500 * BLOCK_SIZE * 0.9
            assert plan.plan.bytes_freed == pytest.approx(freed, rel=0.05)
            assert await chain.parts.content(kept) == expected
            assert await chain.verify() == {}
            assert not [key for key in after if key.startswith("quarantine/")]

    asyncio.run(check())


def test_dry_run_changes_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.delete(await chain.snapshot(1, SIZE, blocks(range(300))))
            before = await chain.keys()
            responses = await chain.prune(dry_run=True)
            assert await chain.keys() == before
            assert chain.catalog.control.number == 0
            assert not responses[-1].done
            assert responses[-1].plan.objects_deleted >= 2
            assert responses[-1].plan.bytes_freed > 300 * BLOCK_SIZE * 0.9

    asyncio.run(check())


async def _half_dead(chain: Chain) -> tuple[bytes, SnapshotReader]:
    """Two snapshots share half of the packs of the first, which is deleted: (the second's content, an old reader)."""
    first = await chain.snapshot(1, SIZE, blocks(range(640)))
    second = await chain.snapshot(2, SIZE, {**blocks(range(0, 640, 128)), **blocks(range(64, 192))})
    expected = await chain.parts.content(second)
    reader = SnapshotReader(chain.parts.repository, 16 * MIB)
    await reader.index.load()
    await chain.delete(first)
    return expected, reader


def test_live_frames_move_and_readers_follow(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            expected, reader = await _half_dead(chain)
            before = await chain.keys("packs")
            response = (await chain.prune())[-1]
            assert response.plan.packs_repacked == 1
            after = await chain.keys("packs")
            assert before.keys().isdisjoint(after)
            assert sum(after.values()) < sum(before.values())
            digest = chain.catalog.control.records[SnapshotId(snapshot_id(2))].root
            root = await reader.root(snapshot_id(2), digest)
            chain.parts.reader = reader  # whose index names objects that are gone
            assert await chain.parts.content(root) == expected
            assert await chain.verify() == {}

    asyncio.run(check())


def test_what_is_little_dead_is_not_moved(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await _half_dead(chain)
            before = await chain.keys("packs")
            response = (await chain.prune(repack_share=0.95))[-1]
            assert (response.plan.packs_repacked, response.plan.bytes_copied) == (0, 0)
            assert await chain.keys("packs") == before

    asyncio.run(check())


@pytest.mark.parametrize("share", [{"repack_share": 0.0}, {}])
def test_a_share_of_nothing_is_no_default(tmp_path: Path, share: dict[str, float]) -> None:
    """One of 40 blocks is dead: too little for the default, and anything is enough for 0."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            first = await chain.snapshot(1, SIZE, blocks(range(1280)))
            await chain.snapshot(2, SIZE, blocks(range(64, 1280)))
            await chain.delete(first)
            assert (await chain.prune(**share))[-1].plan.packs_repacked == len(share)

    asyncio.run(check())


def test_packs_of_pending_snapshots_stay(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(100)))
            record = chain.catalog.control.records[SnapshotId(root.snapshot)]
            chain.catalog.control.records[SnapshotId(root.snapshot)] = Record(pb.SNAPSHOT_STATE_PENDING, {})
            await chain.store.delete(root_key(root.snapshot, record.root))
            before = await chain.keys("packs")
            await chain.prune()
            assert await chain.keys("packs") == before
            del chain.catalog.control.records[SnapshotId(root.snapshot)]
            await chain.prune()
            assert not await chain.keys("packs")
            assert record.root

    asyncio.run(check())


def test_roots_that_control_does_not_know_keep_what_they_need(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(100)))
            expected = await chain.parts.content(root)
            (key,) = await chain.keys("snapshots")
            chain.catalog.control.records.clear()
            before = await chain.keys()
            await chain.prune()
            assert await chain.keys() == before
            problems = {each.object: each.message for each in (await chain.check()).problems}
            assert "adopt" in problems[key]
            assert await chain.parts.content(root) == expected

    asyncio.run(check())


@pytest.mark.parametrize("folder", ["snapshots", "shards", "packs"])
def test_nothing_is_pruned_while_something_needed_is_gone(tmp_path: Path, folder: str) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            kept = await chain.snapshot(1, SIZE, blocks(range(100)))
            (lost,) = await chain.keys(folder)
            await chain.delete(await chain.snapshot(2, SIZE, blocks(range(100), 5)))
            await chain.store.delete(lost)
            before = await chain.keys()
            with pytest.raises(Corrupt, match="nothing is pruned"):
                await chain.prune()
            assert await chain.keys() == before
            assert kept.volume == VOLUME

    asyncio.run(check())


def test_a_lost_or_damaged_index_is_made_anew_from_trailers(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, blocks(range(100)))
            expected = await chain.parts.content(root)
            (index,) = await chain.keys("index")
            await chain.store.put(index, b"rot")
            assert await chain.verify() == {index: {root.snapshot}}
            await chain.prune()
            assert await chain.verify() == {}
            assert index not in await chain.keys("index")
            chain.parts.reader = SnapshotReader(chain.parts.repository, 16 * MIB)
            assert await chain.parts.content(root) == expected

    asyncio.run(check())


def test_the_second_of_two_prunes_is_fenced(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.delete(await chain.snapshot(1, SIZE, blocks(range(100))))

            class Slow(Pruner):
                async def _raise(self, expected: int) -> int:
                    await chain.prune()
                    return await super()._raise(expected)

            with pytest.raises(Fenced, match="prune number"):
                async for _ in Slow(chain.parts.repository, chain.catalog).run(dry_run=False):
                    pass
            assert not await chain.keys("packs")
            assert not await chain.keys("quarantine")

    asyncio.run(check())


def test_a_cancelled_prune_leaves_nothing_behind(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            expected, _ = await _half_dead(chain)
            responses = chain.service.Prune(pb.PruneRequest(), None)  # type: ignore[arg-type]
            async for each in responses:
                if each.progress.phase == "copying":
                    break
            await responses.aclose()  # type: ignore[attr-defined]
            assert (await chain.prune())[-1].done
            assert not await chain.keys("quarantine")
            digest = chain.catalog.control.records[SnapshotId(snapshot_id(2))].root
            root = await chain.parts.reader.root(snapshot_id(2), digest)
            assert await chain.parts.content(root) == expected
            assert (await chain.check()).unreferenced_objects == 0

    asyncio.run(check())


def test_many_small_indexes_become_few(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            roots = [await chain.snapshot(number, SIZE, blocks(range(2), number)) for number in range(1, 41)]
            assert len(await chain.keys("index")) == 40
            await chain.prune()
            assert len(await chain.keys("index")) == 1
            assert await chain.verify() == {}
            assert len(roots) == 40

    asyncio.run(check())


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            with pytest.raises(InvalidRequest, match="between 0 and 1"):
                await chain.prune(repack_share=1.5)
            await chain.parts.repository.take_over("another cluster")
            with pytest.raises(Conflict, match="another cluster"):
                await chain.prune()

    asyncio.run(check())
