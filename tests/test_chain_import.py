"""Snapshots that are made of an image: what reads back, what makes none, and what happens beside."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockstore.domain import SnapshotId
from blockstore.errors import Conflict, InvalidRequest, OutOfRange, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.repository_objects import REPOSITORY_KEY, RepositoryObject, encode_repository
from tests.chain_parts import Chain, LocalCatalog, chain_at, content
from tests.stack import until

SIZE = 8 * MIB
NONE: Any = None


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
            await asyncio.wait_for(chain.snapshot(1, SIZE, {number: content(number) for number in range(9)}), 60)
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
