"""Several roots of one snapshot: which one counts, what becomes of the others, and roots of the first layout."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.layout import SNAPSHOTS, RootName, quarantine_key, quarantine_number, root_key, root_name
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import ObjectInfo
from snapshotd.prune_plan import mark
from snapshotd.quarantine import encode_quarantine
from snapshotd.reader import SnapshotReader
from snapshotd.root import Root
from snapshotd.root_objects import roots_of
from tests.chain_parts import CONTEXT, Chain, blocks, chain_at
from tests.chain_schedule import Record
from tests.plain_reader import PlainReader, unwrap_key
from tests.snapshot_parts import snapshot_id

SIZE = 8 * MIB
CHANGES = blocks(range(100))


async def _two_attempts(chain: Chain) -> tuple[Root, bytes, bytes]:
    """Snapshot 1, whole, with what an attempt left that wrote all of it anew: (root, its SHA-256, the other's)."""
    _, left = await chain.parts.snapshot(1, SIZE, {**CHANGES, 500: bytes(BLOCK_SIZE)})
    root = await chain.snapshot(1, SIZE, CHANGES)
    return root, chain.catalog.control.records[SnapshotId(root.snapshot)].root, left


async def _adopt(chain: Chain) -> pb.AdoptResponse:
    return [each async for each in chain.service.Adopt(pb.AdoptRequest(), CONTEXT)][-1]


def test_prune_removes_what_attempts_left_once_control_took_one(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root, taken, left = await _two_attempts(chain)
            assert taken != left
            record = chain.catalog.control.records.pop(SnapshotId(root.snapshot))
            for known in ({}, {SnapshotId(root.snapshot): Record(pb.SNAPSHOT_STATE_PENDING, {})}):
                chain.catalog.control.records = known
                await chain.prune()
                assert len(await chain.keys(SNAPSHOTS)) == 2, "any of them may still be taken"
            chain.catalog.control.records = {SnapshotId(root.snapshot): record}
            assert (await chain.check()).unreferenced_objects >= 1
            plan = (await chain.prune())[-1]
            assert plan.done
            assert plan.plan.objects_deleted >= 1
            assert set(await chain.keys(SNAPSHOTS)) == {root_key(root.snapshot, taken)}
            assert not await chain.keys("quarantine")
            assert (await chain.check()).unreferenced_objects == 0
            assert await chain.verify() == {}
            assert await chain.parts.content(root) == b"".join(CHANGES.values()).ljust(SIZE, b"\0")

    asyncio.run(check())


def test_a_root_that_comes_after_its_snapshot_was_deleted_is_pruned_and_never_adopted(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            kept = await chain.snapshot(1, SIZE, CHANGES)
            late, _ = await chain.parts.snapshot(2, SIZE, {**CHANGES, 500: b"x" * BLOCK_SIZE})
            unknown, _ = await chain.parts.snapshot(3, SIZE, {**CHANGES, 600: b"y" * BLOCK_SIZE})
            chain.catalog.control.deleted = frozenset({SnapshotId(late.snapshot)})
            told = await chain.check()
            assert [each.snapshots for each in told.problems] == [[unknown.snapshot]]
            assert told.unreferenced_objects >= 2, "the root, and the pack that only it needs"
            assert list((await _adopt(chain)).snapshots) == [unknown.snapshot]
            assert (await chain.prune())[-1].done
            assert {root_name(key).snapshot for key in await chain.keys(SNAPSHOTS)} == {kept.snapshot, unknown.snapshot}  # type: ignore[union-attr]
            assert (await chain.check()).unreferenced_objects == 0
            assert await chain.verify() == {}

    asyncio.run(check())


def test_deleting_a_snapshot_finds_all_its_roots_and_no_other(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root, taken, left = await _two_attempts(chain)
            early = RootName(root.snapshot, "")
            await chain.store.put(early.key, await chain.store.get(root_key(root.snapshot, taken)))
            others = [await chain.snapshot(number, SIZE, {}) for number in (0, 2, 3)]
            found = await roots_of(chain.store, root.snapshot)
            assert sorted(found) == sorted([early, *(RootName(root.snapshot, each.hex()) for each in (taken, left))])
            for each in others:
                (only,) = await roots_of(chain.store, each.snapshot)
                assert only.snapshot == each.snapshot

    asyncio.run(check())


def test_of_many_snapshots_no_more_are_listed_than_needed(tmp_path: Path) -> None:
    """On S3 all that lie behind one would be a request for each thousand, for each snapshot that is deleted."""

    class Listed(MemoryStore):
        count = 0

        async def list(self, prefix: str = "", *, after: str = "") -> AsyncIterator[ObjectInfo]:
            async for info in super().list(prefix, after=after):
                self.count += 1
                yield info

    async def check() -> None:
        store = Listed()
        for number in range(400):
            await store.put(root_key(snapshot_id(number), bytes(32)), b"")
        for number in (0, 7, 15, 16, 399):
            store.count = 0
            assert [each.snapshot for each in await roots_of(store, snapshot_id(number))] == [snapshot_id(number)]
            assert store.count <= 17

    asyncio.run(check())


def test_a_lost_catalog_takes_the_root_of_which_everything_is_there(tmp_path: Path) -> None:
    """Whatever the order of their names: once the one is damaged, once the other."""

    async def check() -> None:
        for number in (0, 1):
            directory = tmp_path / str(number)
            directory.mkdir()
            async with chain_at(directory) as chain:
                root, taken, left = await _two_attempts(chain)
                chain.catalog.control.records.clear()
                whole, damaged = ((taken, left), (left, taken))[number]
                shard = (await chain.parts.reader.root(root.snapshot, damaged)).shards[0]
                await chain.store.delete(f"shards/{shard}")
                answer = await _adopt(chain)
                assert (list(answer.snapshots), list(answer.problems)) == ([root.snapshot], [])
                assert (answer.progress.done, answer.progress.total) == (1, 1)
                assert chain.catalog.control.records[SnapshotId(root.snapshot)].root == whole
                await chain.prune()
                assert await chain.verify() == {}
                assert len(await chain.keys(SNAPSHOTS)) == 1

    asyncio.run(check())


def test_a_root_that_a_prune_means_to_delete_is_not_adopted(tmp_path: Path) -> None:
    """A prune of the lost cluster may still be about to do it."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root, taken, left = await _two_attempts(chain)
            chain.catalog.control.records.clear()
            for gone, answer in ((left, [root.snapshot]), (taken, [])):
                stored = encode_quarantine(chain.parts.repository.keys, 7, [mark(gone.hex())], gone[:16])
                await chain.store.put(quarantine_key(7), stored)
                if answer:
                    assert list((await _adopt(chain)).snapshots) == answer
                    assert chain.catalog.control.records.pop(SnapshotId(root.snapshot)).root == taken
                    await chain.store.delete(root_key(root.snapshot, left))
                else:
                    (problem,) = (await _adopt(chain)).problems
                    assert "its root, which a prune" in problem.message

    asyncio.run(check())


def test_what_is_no_name_of_a_root_is_told_and_left_alone(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            strange = [
                f"{SNAPSHOTS}{each}" for each in ("notes", f"{snapshot_id(1)}.", f"{snapshot_id(1)}.{'AB' * 32}")
            ]
            assert [root_name(key) for key in strange] == [None] * 3
            for key in strange:
                await chain.store.put(key, b"x")
            assert [(each.object, list(each.snapshots)) for each in (await _adopt(chain)).problems] == [
                (key, []) for key in sorted(strange)
            ]
            await chain.prune()
            assert set(await chain.keys(SNAPSHOTS)) == set(strange)
            assert {each.object for each in (await chain.check()).problems} == set(strange)

    asyncio.run(check())


def test_check_does_not_tell_of_a_root_whose_snapshot_may_be_retried(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, CHANGES)
            records = chain.catalog.control.records
            for state in (pb.SNAPSHOT_STATE_ERROR, pb.SNAPSHOT_STATE_PENDING):
                records[SnapshotId(root.snapshot)] = Record(state, {})
                found = await chain.check()
                assert (list(found.problems), found.unreferenced_objects) == ([], 0)
            records.clear()
            (problem,) = (await chain.check()).problems
            assert "adopt" in problem.message

    asyncio.run(check())


def test_a_number_that_no_quarantine_has_is_told_and_passed_over(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.delete(await chain.snapshot(1, SIZE, CHANGES))
            strange = [f"quarantine/{each}" for each in (1 << 64, "007", "x")]
            assert [quarantine_number(key) for key in strange] == [None] * 3
            assert quarantine_number(quarantine_key((1 << 64) - 1)) == (1 << 64) - 1
            for key in strange:
                await chain.store.put(key, b"x")
            await chain.prune()
            assert not await chain.keys("packs")
            assert {each.object for each in (await chain.check()).problems} == set(strange)

    asyncio.run(check())


# ---- the first layout: a root under the snapshot's id alone


async def _early(chain: Chain, root: Root) -> RootName:
    """As the first releases stored it."""
    early = RootName(root.snapshot, "")
    (key,) = await chain.keys(SNAPSHOTS)
    await chain.store.put(early.key, await chain.store.get(key))
    await chain.store.delete(key)
    chain.parts.reader.forget_root(root.snapshot)
    return early


def test_a_root_of_the_first_layout_is_read_verified_kept_adopted_and_deleted(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            root = await chain.snapshot(1, SIZE, CHANGES)
            digest = chain.catalog.control.records[SnapshotId(root.snapshot)].root
            early = await _early(chain, root)
            assert await chain.parts.reader.root(root.snapshot, digest) == root
            assert await chain.verify() == {}
            assert list((await chain.check()).problems) == []
            await chain.prune()
            assert set(await chain.keys(SNAPSHOTS)) == {early.key}
            chain.catalog.control.records.clear()
            await chain.prune()
            assert list((await _adopt(chain)).snapshots) == [root.snapshot]
            assert chain.catalog.control.records[SnapshotId(root.snapshot)].root == digest
            bucket = {key: await chain.store.get(key) for key in await chain.keys()}
            read = PlainReader(bucket, *unwrap_key(bucket, tmp_path / "keyring"))
            assert dict(read.blocks(root.snapshot)) == CHANGES
            await chain.store.put(early.key, (await chain.store.get(early.key))[:-1] + b"!")
            assert set(await chain.verify()) == {early.key}
            with pytest.raises(Corrupt, match="not the one that the catalog names"):
                await SnapshotReader(chain.parts.repository, MIB).root(root.snapshot, digest)
            await chain.delete(root)
            assert not await chain.keys(SNAPSHOTS)

    asyncio.run(check())
