"""Rules of prune and of writers that only a rare instant shows: each is broken at that very instant, and loses then.

The other rules: tests/test_chain_prune_race.py (the quarantine, the number, the order of index and deletion, rules A
and B) and tests/test_chain_prune_simulation.py (the second look, the number).
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

import pytest

from blockstore.domain import SnapshotId
from blockstore.errors import CairnError, Conflict
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import MIB
from snapshotd.inventory import load_quarantines
from snapshotd.layout import quarantine_key
from snapshotd.prune import Pruner
from snapshotd.prune_look import View
from snapshotd.prune_plan import Marks, merge_marks
from snapshotd.reader import SnapshotReader
from snapshotd.repack import Repacked
from snapshotd.root_objects import roots_of
from snapshotd.writer import SnapshotWriter
from tests.chain_parts import Chain, blocks, chain_at
from tests.chain_schedule import Record
from tests.snapshot_parts import CLUSTER, facts, snapshot_id

SIZE: Final = 8 * MIB
WANTED: Final = blocks(range(100))
_LOSES: Final = (AssertionError, CairnError)


async def _expect(chain: Chain, number: int, digest: bytes, changes: Mapping[int, bytes]) -> None:
    """Read by somebody who keeps nothing."""
    reader = SnapshotReader(chain.parts.repository, 16 * MIB)
    root = await reader.root(snapshot_id(number), digest)
    for block, expected in changes.items():
        assert (await reader.read(root, block, 1))[1] == expected
    assert await chain.verify() == {}


class _Held(Pruner):
    """Does something else once, when it has asked for the number and is about to delete."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def _check_number(self, raised: int) -> None:
        await super()._check_number(raised)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()


class _TakenOver(Pruner):
    """Another cluster takes the store over when all is written, and nothing is deleted yet."""

    async def _write_indexes(self, view: View, gone: Collection[str], repacked: Repacked) -> set[str]:
        await self.repository.take_over("another")
        return await super()._write_indexes(view, gone, repacked)


async def _drain(pruner: Pruner) -> None:
    async with aclosing(pruner.run(dry_run=False)) as progress:
        async for _ in progress:
            pass


# ---- rule C: nobody removes another's quarantine before everything in it is gone


class _CleansUpTooEarly(Pruner):
    async def _end_quarantines(self, view: View, number: int) -> None:
        for each in view.inventory.quarantines:
            await self.repository.store.delete(quarantine_key(each))
        await super()._end_quarantines(view, number)


async def _retried_between_two_prunes(directory: Path, second: type[Pruner]) -> None:
    """A snapshot is in error while one prune looks, and pending while another one does, which spares its shards."""
    async with chain_at(directory) as chain:
        snapshot = SnapshotId(snapshot_id(1))
        records = chain.catalog.control.records
        writer = SnapshotWriter(chain.parts.packs, chain.parts.reader, snapshot, SIZE)
        for block, content in WANTED.items():
            await writer.put_blocks(block, content)
        await writer.settle()
        records[snapshot] = Record(pb.SNAPSHOT_STATE_ERROR, {})
        digests = []

        async def meanwhile() -> None:
            records[snapshot].state = pb.SNAPSHOT_STATE_PENDING
            await _drain(second(chain.parts.repository, chain.catalog))
            number = (await chain.catalog.roots()).number
            marks = merge_marks((await load_quarantines(chain.parts.repository)).values())
            await chain.parts.packs.look(snapshot)
            writer.shunned = marks
            await writer.mend_shards(marks)
            for run in await writer.stale_runs(marks):
                for block in range(run.start, run.start + run.length):
                    await writer.put_blocks(block, WANTED[block])
            await writer.settle()
            _, digest = await writer.finish(facts(1, SIZE))
            chain.catalog.control.complete(snapshot, digest, number)
            digests.append(digest)

        first = _Held(chain.parts.repository, chain.catalog)
        first.meanwhile = meanwhile
        await _drain(first)
        await _expect(chain, 1, digests[0], WANTED)
        await chain.prune()
        await chain.prune()
        await _expect(chain, 1, digests[0], WANTED)
        assert not await chain.keys("quarantine")


def test_a_prune_deletes_nothing_in_a_store_that_was_taken_over(tmp_path: Path) -> None:
    """The other cluster's uploads complete by its own prune number, and may have looked before our quarantine came."""

    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.snapshot(1, SIZE, WANTED)
            chain.catalog.control.records.clear()
            for root in await roots_of(chain.store, snapshot_id(1)):
                await chain.store.delete(root.key)
            packs, shards = await chain.keys("packs"), await chain.keys("shards")
            with pytest.raises(Conflict, match="belongs to the cluster another"):
                await _drain(_TakenOver(chain.parts.repository, chain.catalog))
            assert (await chain.keys("packs"), await chain.keys("shards")) == (packs, shards)
            await chain.parts.repository.take_over(CLUSTER)
            await _drain(Pruner(chain.parts.repository, chain.catalog))
            assert not await chain.keys("packs")

    asyncio.run(check())


def test_a_quarantine_stays_while_something_in_it_is_there(tmp_path: Path) -> None:
    asyncio.run(_retried_between_two_prunes(tmp_path, Pruner))


def test_without_rule_c_a_snapshot_is_lost(tmp_path: Path) -> None:
    with pytest.raises(_LOSES):
        asyncio.run(_retried_between_two_prunes(tmp_path, _CleansUpTooEarly))


# ---- the quarantine is published before the number is raised


class _PublishesLate(Pruner):
    """Does something else between the number and the quarantine."""

    meanwhile: Callable[[], Awaitable[None]] | None = None
    held: tuple[int, Marks] | None = None

    async def _publish(self, number: int, marks: Marks) -> None:
        self.held = number, marks

    async def _write_indexes(self, view: View, gone: object, repacked: object) -> set[str]:
        assert self.meanwhile is not None
        assert self.held is not None
        await self.meanwhile()
        await super()._publish(*self.held)
        return await super()._write_indexes(view, gone, repacked)  # type: ignore[arg-type]


def test_with_the_number_raised_before_the_quarantine_is_there_an_upload_is_lost(tmp_path: Path) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            await chain.delete(await chain.snapshot(1, SIZE, WANTED))
            digests = []

            async def meanwhile() -> None:
                digests.append(await chain.upload(2, SIZE, WANTED))

            pruner = _PublishesLate(chain.parts.repository, chain.catalog)
            pruner.meanwhile = meanwhile
            await _drain(pruner)
            await _expect(chain, 2, digests[0], WANTED)

    with pytest.raises(_LOSES):
        asyncio.run(check())


# ---- a plan that is cut to what one quarantine may hold


@pytest.mark.parametrize("most_marks", [2, 3, 7, 1000])
def test_a_plan_with_more_marks_than_fit_is_carried_out_in_several_prunes(tmp_path: Path, most_marks: int) -> None:
    async def check() -> None:
        async with chain_at(tmp_path) as chain:
            kept = await chain.snapshot(1, SIZE, blocks(range(130)))
            dead = [await chain.snapshot(number, SIZE, blocks(range(70), number)) for number in range(2, 8)]
            await chain.delete(await chain.snapshot(8, SIZE, blocks(range(64, 200)), kept))
            for each in dead:
                await chain.delete(each)
            expected = await chain.parts.content(kept)
            published: list[Marks] = []

            class Watched(Pruner):
                async def _publish(self, number: int, marks: Marks) -> None:
                    published.append(marks)
                    await super()._publish(number, marks)

            while (await chain.check()).unreferenced_objects:
                count = len(published)
                await _drain(Watched(chain.parts.repository, chain.catalog, most_marks=most_marks))
                assert len(published) == count + 1, "each goes further"
                assert await chain.verify() == {}
                assert len(published) < 50
            assert max(map(len, published)) <= most_marks
            assert len(published) > 1 or most_marks == 1000
            assert await chain.parts.content(kept) == expected

    asyncio.run(check())
