"""Ships from real nodes into a store in memory; control is played by the test, which decides when it answers what."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, BlockNumber
from snapshotd.index import Index, IndexEntry, encode_index
from snapshotd.inventory import load_quarantines
from snapshotd.layout import INDEXES, PACKS, QUARANTINES, SHARDS, SNAPSHOTS, pack_key, root_key
from snapshotd.object_store import Data
from snapshotd.prune_plan import mark
from snapshotd.quarantine import encode_quarantine
from snapshotd.reader import SnapshotReader
from snapshotd.repository import Repository
from tests.snapshot_parts import snapshot_id
from tests.snapshotd_shipping import SIZE, Shipping, shipping
from tests.stack import in_loop, until


def test_a_change_ships_as_one(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, content):
            await here.ship(1, 1).run()
            assert await here.content(1) == bytes(content)
            before = here.store.put_bytes("")
            await volume.trim(60, 10)
            content[60 * BLOCK_SIZE : 70 * BLOCK_SIZE] = bytes(10 * BLOCK_SIZE)
            await volume.seal(snapshot_id(2).encode())
            shipped = here.ship(2, 2, base=1)
            await shipped.run()
            assert await here.content(2) == bytes(content)
            assert here.store.put_bytes("") - before < 2048
            progress = shipped.progress.message()
            assert progress.bytes_done == progress.bytes_total == 10 * BLOCK_SIZE

    in_loop(check)


def test_an_answer_that_was_lost_is_asked_for_again_and_the_first_root_stays(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            here.control.errors = [(True, QuorumUnavailable("the answer is lost"))]
            await here.ship(1, 1).run()
            assert here.control.calls == 2
            assert await here.content(1) == bytes(content)
            assert here.control.failed == {}
            assert 200 * BLOCK_SIZE < here.store.put_bytes("packs/") < 200 * BLOCK_SIZE * 1.1

    in_loop(check)


def test_a_prune_in_the_middle_has_what_it_means_to_delete_written_anew(tmp_path: Path) -> None:
    """Between the root and the completion: everything stored so far is in quarantine, and then gone."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            keys = here.parts.repository.keys
            names: list[str] = []
            old: list[str] = []

            async def prune() -> None:
                packs = {part.pack for entry in here.parts.index.present() for part in entry.parts}
                names.extend([key.rpartition("/")[2] async for key in _keys(here, SHARDS)])
                old.extend(here.parts.index.map.entries)
                marks = packs | {mark(name) for name in names}
                await here.store.inner.put(QUARANTINES + "7", encode_quarantine(keys, 7, marks, bytes(16)))
                here.control.number += 1

            here.control.before_complete = prune
            await here.ship(1, 1).run()
            assert here.control.calls == 2
            assert names
            assert old
            for name in old:
                await here.store.delete(pack_key(name))
            for name in names:
                await here.store.delete(SHARDS + name)
            assert await here.content(1) == bytes(content)

    in_loop(check)


def test_a_quarantine_that_came_with_the_number_is_seen(tmp_path: Path) -> None:
    """The number is read first: a prune that raised it before published what it means to delete before that."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            await here.ship(1, 1).run()
            doomed = [key for folder in (INDEXES, PACKS, SHARDS) async for key in _keys(here, folder)]
            marks = {part.pack for entry in here.parts.index.present() for part in entry.parts}
            stored = encode_quarantine(here.parts.repository.keys, 7, marks, bytes(16))
            has_begun = False

            async def prune_begins() -> int:
                nonlocal has_begun
                if not has_begun:
                    has_begun = True
                    await here.store.put(QUARANTINES + "7", stored)
                    here.control.number += 1
                return here.control.number

            here.control.prune_number = prune_begins  # type: ignore[method-assign]
            await here.ship(2, 1).run()
            for key in doomed:
                await here.store.delete(key)
            assert await here.content(2) == bytes(content)

    in_loop(check)


def test_what_a_prune_deleted_before_its_quarantine_went_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored is looked at last: a prune that ended takes its quarantine away when all of it is gone."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            await here.ship(1, 1).run()
            doomed = [key for folder in (INDEXES, PACKS, SHARDS) async for key in _keys(here, folder)]

            async def prune_ends(repository: Repository) -> dict[int, frozenset[bytes]]:
                for key in doomed:
                    await here.store.delete(key)
                return await load_quarantines(repository)

            monkeypatch.setattr("snapshotd.ship.load_quarantines", prune_ends)
            await here.ship(2, 1).run()
            assert await here.content(2) == bytes(content)

    in_loop(check)


async def _keys(here: Shipping, folder: str) -> AsyncIterator[str]:
    async for info in here.store.list(folder):
        yield info.key


def test_a_store_that_another_cluster_took_over_meanwhile_completes_nothing(tmp_path: Path) -> None:
    """That one prunes what it knows no root of: here all but the root was stored before it came."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, _):
            repository, put = here.parts.repository, here.store.put

            async def put_after_takeover(key: str, data: Data, *, if_absent: bool = False) -> bool:
                if key.startswith(SNAPSHOTS):
                    here.store.put = put  # type: ignore[method-assign]
                    await repository.take_over("another")
                return await put(key, data, if_absent=if_absent)

            here.store.put = put_after_takeover  # type: ignore[method-assign]
            await here.ship(1, 1).run()
            assert here.control.completed == {}
            assert "belongs to the cluster another" in here.control.failed[snapshot_id(1)]

    in_loop(check)


def test_what_one_ship_must_not_find_another_that_begins_does_not_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first looked while a prune was at work; the second begins when that has ended, and has not looked yet."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):
            await here.ship(1, 1).run()
            packs, look = here.parts.packs, here.parts.packs.look
            marks = {part.pack for entry in here.parts.index.present() for part in entry.parts}
            stored = encode_quarantine(here.parts.repository.keys, 7, marks, bytes(16))
            await here.store.put(QUARANTINES + "7", stored)
            looked, go_on, begun, never = (asyncio.Event() for _ in range(4))

            async def held(snapshot: str = "") -> None:
                if snapshot == snapshot_id(3):
                    begun.set()
                    await never.wait()
                await look(snapshot)
                looked.set()
                await go_on.wait()

            monkeypatch.setattr(packs, "look", held)
            first = asyncio.create_task(here.ship(2, 1).run())
            await looked.wait()
            for folder in (INDEXES, PACKS, QUARANTINES):
                for key in [each async for each in _keys(here, folder)]:
                    await here.store.delete(key)
            second = asyncio.create_task(here.ship(3, 1).run())
            await begun.wait()
            go_on.set()
            await first
            second.cancel()
            assert await here.content(2) == bytes(content)

    in_loop(check)


def test_the_root_of_an_earlier_attempt_is_not_taken_where_its_shards_are_gone(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, _, content):

            async def lose() -> None:
                for key in [each async for each in _keys(here, SHARDS)]:
                    await here.parts.reader.shard_named(key.rpartition("/")[2])  # kept, as by any look at references
                    await here.store.delete(key)

            here.control.before_complete = lose
            here.control.errors = [(False, QuorumUnavailable("control is away"))]
            await here.ship(1, 1).run()
            reader = SnapshotReader(here.parts.repository, MIB, here.parts.index)
            root = await reader.root(snapshot_id(1), here.control.completed[snapshot_id(1)])
            here.parts.reader = reader
            assert await here.parts.content(root) == bytes(content)

    in_loop(check)


def test_a_base_that_is_gone_fails_the_snapshot_with_the_reason(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, _):
            await here.ship(1, 1).run()
            await volume.seal(snapshot_id(2).encode())
            shipped = here.ship(2, 2, base=1)
            await here.store.delete(root_key(snapshot_id(1), here.control.completed[snapshot_id(1)]))
            await shipped.run()
            assert f"{snapshot_id(1)}, which cannot be read" in here.control.failed[snapshot_id(2)]
            assert "delete that, then retry this" in here.control.failed[snapshot_id(2)]

    in_loop(check)


@pytest.mark.parametrize("folder", [SHARDS, PACKS])
def test_a_base_that_has_lost_what_is_taken_over_fails_the_snapshot(tmp_path: Path, folder: str) -> None:
    """Nothing that changes lies where the loss is, so nobody reads it."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, _):
            await here.ship(1, 1).run()
            await volume.seal(snapshot_id(2).encode())
            for key in [each async for each in _keys(here, folder)]:
                await here.store.delete(key)
            await here.ship(2, 2, base=1).run()
            assert here.control.completed.keys() == {snapshot_id(1)}
            assert f"a change of {snapshot_id(1)}, which cannot be read" in here.control.failed[snapshot_id(2)]

    in_loop(check)


def test_a_stale_entry_of_an_index_is_no_loss(tmp_path: Path) -> None:
    """A late prune's index may name what is gone, and what the base needs lies elsewhere."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, content):
            await here.ship(1, 1).run()
            await volume.seal(snapshot_id(2).encode())
            (entry,) = here.parts.index.present()
            stale = Index((IndexEntry("ab" * 32, entry.size, entry.parts),))
            name, stored = encode_index(here.parts.repository.keys, stale, bytes(16))
            await here.store.put(INDEXES + name, stored)
            await here.ship(2, 2, base=1).run()
            assert here.parts.index.lacks_something
            assert await here.content(2) == bytes(content)

    in_loop(check)


def test_a_base_that_was_deleted_and_pruned_meanwhile_is_not_built_upon(tmp_path: Path) -> None:
    """Control gave the snapshot another base after a retry, and this daemon has not heard of it yet."""

    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, _):
            await here.ship(1, 1).run()
            await volume.write(BlockNumber(900), bytes([7]) * BLOCK_SIZE)
            await volume.seal(snapshot_id(2).encode())
            shipped = here.ship(2, 2, base=1)
            of_base = [each async for each in _keys(here, "")]

            async def prune() -> None:
                del here.control.completed[snapshot_id(1)]
                here.control.retries[snapshot_id(2)] = 1
                for key in of_base:
                    if key.startswith((SHARDS, PACKS, INDEXES)):
                        await here.store.delete(key)
                here.control.number += 1

            here.control.before_complete = prune
            await shipped.run()
            assert (here.control.completed, here.control.failed) == ({}, {})

    in_loop(check)


def test_nodes_that_are_away_are_waited_for_and_it_says_so(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, volume, content):
            await here.stack.until_all_whole(volume)
            shipped = here.ship(1, 1)
            for index in range(3):
                await here.stack.stop_node(index)
            running = asyncio.create_task(shipped.run())
            await until(lambda: bool(shipped.progress.why), "the progress says why it stands still")
            for index in range(3):
                await here.stack.start_node(index)
            segment = here.stack.where().segments[0]
            segment.size_bytes = SIZE
            shipped.move(pb.ShipTask(segments=[segment]))
            await running
            assert await here.content(1) == bytes(content)

    in_loop(check)


def test_a_task_that_is_somebody_elses_ends(tmp_path: Path) -> None:
    async def check() -> None:
        async with shipping(tmp_path) as (here, _, _):
            here.control.errors = [(False, Fenced("it was given to another daemon"))]
            await here.ship(1, 1).run()
            assert (here.control.completed, here.control.failed) == ({}, {})

    in_loop(check)
