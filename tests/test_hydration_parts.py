"""The small parts that a restored volume is made of, each against something dumber than itself."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.domain import SnapshotId
from blockstore.errors import Corrupt, NoSpace, QuorumUnavailable
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MIB
from blockstore.volume.block_bits import bits_of, mask, runs_of, set_bits
from blockstore.volume.fill_queue import FillQueue
from blockstore.volume.guest_activity import GuestActivity
from blockstore.volume.hydrating_volume import _mapped_ranges
from blockstore.volume.missing_blocks import find_missing
from blockstore.volume.pace import Pace
from blockstore.volume.present_blocks import PresentBlocks
from blockstore.volume.single_flight import SingleFlight
from blockstore.volume.source_client import SHARD_BLOCKS, Source, SourceClient
from blockstore.volume.source_map import SourceMap
from tests.snapshot_source import ROOT, SNAPSHOT, SnapshotSource
from tests.stack import in_loop, until
from tests.virtual_time import in_virtual_time

NUMBERS = st.sets(st.integers(0, 400), max_size=60)
RANGES = st.tuples(st.integers(0, 400), st.integers(0, 100))


def bitmap_of(numbers: set[int], size: int = SHARD_BLOCKS // 8) -> bytes:
    bitmap = bytearray(size)
    for number in numbers:
        bitmap[number // 8] |= 1 << number % 8
    return bytes(bitmap)


# ---- bits


@given(NUMBERS, RANGES)
def test_bits_of_a_range(numbers: set[int], asked: tuple[int, int]) -> None:
    first, count = asked
    bits = bits_of(bitmap_of(numbers), first, count)
    assert {first + i for i in range(count) if bits >> i & 1} == numbers & set(range(first, first + count))
    assert bits <= mask(count)


@given(NUMBERS)
def test_runs_are_the_set_bits_in_order_and_apart(numbers: set[int]) -> None:
    runs = list(runs_of(int.from_bytes(bitmap_of(numbers), "little")))
    assert [n for first, count in runs for n in range(first, first + count)] == sorted(numbers)
    assert all(first + count < after for (first, count), (after, _) in itertools.pairwise(runs))


@given(NUMBERS, st.integers(0, 400), st.integers(1, 100))
def test_setting_bits(numbers: set[int], first: int, count: int) -> None:
    bitmap = bytearray(bitmap_of(numbers, 64))
    set_bits(bitmap, first, count)
    assert bytes(bitmap) == bitmap_of(numbers | set(range(first, first + count)), 64)


@given(NUMBERS, RANGES)
def test_a_trims_ranges_hold_all_that_is_mapped_and_little_else(numbers: set[int], asked: tuple[int, int]) -> None:
    start, end = asked[0], asked[0] + asked[1]
    ranges = list(_mapped_ranges(bitmap_of(numbers), start, end))
    covered = {n for first, last in ranges for n in range(first, last)}
    assert numbers & set(range(start, end)) <= covered <= set(range(start, end))
    assert all(first in numbers and last - 1 in numbers for first, last in ranges)
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(ranges))


# ---- what is there


@given(st.lists(st.tuples(st.integers(0, 3 * SHARD_BLOCKS), st.integers(1, 300)), max_size=8))
def test_present_blocks_across_shards(added: list[tuple[int, int]]) -> None:
    present, there = PresentBlocks(2 * SHARD_BLOCKS + 100), set[int]()
    for start, count in added:
        present.add(start, count)
        there |= set(range(start, min(start + count, 2 * SHARD_BLOCKS + 100)))
    for start in {start for start, _ in added} | {SHARD_BLOCKS - 50}:
        bits = present.bits(start, 200)
        assert {start + i for i in range(200) if bits >> i & 1} == there & set(range(start, start + 200))


class Answering:
    """A source and its map, as a client sees them."""

    def __init__(self, numbers: set[int], blocks: int) -> None:
        content = {number: bytes(BLOCK_SIZE) for number in numbers}
        self.server = SnapshotSource(content, blocks * BLOCK_SIZE)  # type: ignore[abstract]

    async def __aenter__(self) -> SourceClient:
        await self.server.start()
        source = Source(SnapshotId(SNAPSHOT), ROOT, self.server.size_bytes, (self.server.address,))
        self.client = SourceClient(source, 60.0)
        return self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.stop()


def soon() -> float:
    return asyncio.get_running_loop().time() + 60


async def listed(numbers: set[int]) -> AsyncIterator[pb.ChangedExtent]:
    for extent in sorted({number // EXTENT_BLOCKS for number in numbers}):
        inside = {number % EXTENT_BLOCKS for number in numbers if number // EXTENT_BLOCKS == extent}
        yield pb.ChangedExtent(extent=extent, blocks=bitmap_of(inside, EXTENT_BLOCKS // 8))


def test_what_is_missing_is_what_is_mapped_and_not_listed() -> None:
    mapped = {0, 5, 700, SHARD_BLOCKS - 1, 2 * SHARD_BLOCKS + 3, 3 * SHARD_BLOCKS + 9}
    there = {5, 6, 700, SHARD_BLOCKS + 4, 2 * SHARD_BLOCKS + 3, 4 * SHARD_BLOCKS}

    async def test() -> None:
        async with Answering(mapped, 4 * SHARD_BLOCKS) as client:
            present = PresentBlocks(client.block_count)
            missing = await find_missing(SourceMap(client), listed(there), present, soon())
            assert (missing.blocks_total, missing.blocks_done) == (6, 3)
            found = {s * SHARD_BLOCKS + n for s, bits in missing.shards.items() for n, _ in runs_of(bits)}
            assert found == mapped - there
            assert present.bits(5, 1)

    in_loop(test)


@pytest.mark.parametrize(
    "first", [EXTENT_BLOCKS, SHARD_BLOCKS - EXTENT_BLOCKS, SHARD_BLOCKS, SHARD_BLOCKS + EXTENT_BLOCKS]
)
@pytest.mark.parametrize("length", [EXTENT_BLOCKS, SHARD_BLOCKS, 2 * SHARD_BLOCKS])
def test_a_part_of_a_source_is_that_and_no_more(first: int, length: int) -> None:
    """Segments may begin and end anywhere in a shard; what lies beside a part is another segment's."""
    total = 3 * SHARD_BLOCKS - 7
    edges = {first, first + length, SHARD_BLOCKS, 2 * SHARD_BLOCKS, total}
    mapped = {each + by for each in edges for by in (-2, -1, 0, 1) if each + by < total}

    async def test() -> None:
        async with Answering(mapped, total) as whole:
            part = whole.source.part(first, length * BLOCK_SIZE)
            assert part is not None
            client = SourceClient(part, 60.0)
            blocks = min(length, total - first)
            assert client.block_count == blocks
            expected = {block - first for block in mapped if first <= block < first + blocks}
            bits = await SourceMap(client).bits(0, blocks + 10, soon())
            assert {block for block in range(blocks + 10) if bits >> block & 1} == expected
            fetched = await client.fetch(blocks - 5, 64, background=False)
            assert {blocks - 5 + each for each in range(64) if fetched.mapped >> each & 1} == {
                block for block in expected if block >= blocks - 5
            }
            assert fetched.start == blocks - 5
            await client.close()
            assert whole.source.part(total, MIB) is None

    asyncio.run(test())


def test_a_list_out_of_order_is_refused() -> None:
    async def test() -> None:
        async def wrong() -> AsyncIterator[pb.ChangedExtent]:
            yield pb.ChangedExtent(extent=300, blocks=bytes(31) + b"\x01")
            yield pb.ChangedExtent(extent=1, blocks=bytes(31) + b"\x01")

        async with Answering({1}, SHARD_BLOCKS * 4) as client:
            with pytest.raises(Corrupt, match="out of order"):
                await find_missing(SourceMap(client), wrong(), PresentBlocks(client.block_count), soon())

    in_loop(test)


def test_the_map_is_asked_once_and_cut_at_the_end() -> None:
    async def test() -> None:
        answering = Answering({1, 2, 99}, 100)
        async with answering as client:
            source = SourceMap(client)
            assert await source.bits(0, 200, soon()) == 1 << 1 | 1 << 2 | 1 << 99
            assert await source.bits(99, 50, soon()) == 1
            assert await source.bits(100, 50, soon()) == 0
            assert source.known_bits(98, 4) == 2
            assert answering.server.maps == 1

    in_loop(test)


# ---- fills


class Log:
    """Takes fills, and commits or fails them when told."""

    def __init__(self) -> None:
        self.fills: list[tuple[int, int, asyncio.Future[None]]] = []
        self.contents: list[bytes] = []

    def fill(self, start: int, data: bytes | memoryview) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fills.append((start, len(data), future))
        self.contents.append(bytes(data))
        return future

    def commit(self) -> None:
        for _, _, future in self.fills:
            if not future.done():
                future.set_result(None)

    @property
    def in_flight_bytes(self) -> int:
        return sum(size for _, size, future in self.fills if not future.done())


def test_fills_are_few_at_a_time_and_fewer_while_a_guest_is_busy() -> None:
    async def test() -> None:
        log, busy, filled = Log(), False, list[int]()
        queue = FillQueue(log, lambda start, count: filled.append(start), lambda: busy)
        data = memoryview(os.urandom(64 * BLOCK_SIZE))
        for number in range(200):
            queue.offer(number * 64, data)
        assert log.in_flight_bytes <= 4 * MIB + len(data)
        offered = len(log.fills)
        busy = True
        while log.in_flight_bytes:
            log.commit()
            await asyncio.sleep(0)
            assert len(log.fills) == offered or log.in_flight_bytes <= 512 * 1024
        assert offered < len(filled) < 200, "what was too much is dropped"
        await queue.idle()

    in_loop(test)


@pytest.mark.parametrize("busy", [False, True])
def test_a_long_fill_is_one_but_for_a_busy_guest(busy: bool) -> None:
    async def test() -> None:
        log, filled = Log(), list[tuple[int, int]]()
        queue = FillQueue(log, lambda start, count: filled.append((start, count)), lambda: busy)
        data = memoryview(os.urandom(200 * BLOCK_SIZE))
        await queue.put(1000, data)
        while log.in_flight_bytes:
            assert log.in_flight_bytes <= (256 * 1024 if busy else len(data))
            log.commit()
            await asyncio.sleep(0)
        expected = [(1000, 64), (1064, 64), (1128, 64), (1192, 8)] if busy else [(1000, 200)]
        assert filled == expected
        assert b"".join(log.contents) == data
        assert queue.filled_blocks == 200
        await queue.idle()

    in_loop(test)


def test_a_fill_that_fails_is_told_and_a_closed_queue_fills_nothing() -> None:
    async def test() -> None:
        log = Log()
        queue = FillQueue(log, lambda start, count: None, lambda: True)
        data = memoryview(bytes(64 * BLOCK_SIZE))
        for number in range(3):
            queue.offer(number * 64, data)
        log.fills[0][2].set_exception(NoSpace("no room"))
        await until(lambda: queue.trouble is not None, "the failure is told")
        sent = len(log.fills)
        queue.close()
        queue.offer(640, data)
        await queue.put(704, data)
        log.commit()
        await queue.idle()
        assert len(log.fills) == sent

    in_loop(test)


# ---- pace and patience


def test_the_rate_is_kept_and_may_be_set_anew_while_somebody_waits() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        pace = Pace(GuestActivity())
        pace.limit.set(10 * MIB)
        began = loop.time()
        for _ in range(10):
            await pace.limit.before(MIB)
        assert 0.5 < loop.time() - began < 1.0
        pace.limit.set(1)
        await pace.limit.before(MIB)
        waiting = asyncio.ensure_future(pace.limit.before(MIB))
        await asyncio.sleep(3600)
        assert not waiting.done()
        began = loop.time()
        pace.limit.set(0)
        await waiting
        assert loop.time() == began

    in_virtual_time(test)


def test_patience_ends_at_the_deadline_and_knows_what_is_no_use() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        client = SourceClient(Source(SnapshotId(SNAPSHOT), ROOT, MIB, ()), 1.0)
        with pytest.raises(QuorumUnavailable, match="no daemon"):
            await client.patiently(lambda: client.map_shard(0), loop.time() + 5)
        assert loop.time() <= 5

        async def damaged() -> None:
            raise Corrupt("a frame fails its checksum")

        began = loop.time()
        with pytest.raises(Corrupt):
            await client.patiently(damaged, loop.time() + 5)
        assert loop.time() == began
        with pytest.raises(QuorumUnavailable):
            await client.patiently(asyncio.Event().wait, loop.time() + 30)
        assert loop.time() == pytest.approx(began + 30)

    in_virtual_time(test)


def test_work_under_way_is_joined_and_survives_who_waits() -> None:
    async def test() -> None:
        flight: SingleFlight[int, int] = SingleFlight()
        gate, begun = asyncio.Event(), list[int]()

        async def work() -> int:
            begun.append(1)
            await gate.wait()
            return 7

        first = asyncio.ensure_future(flight.get(1, work))
        others = [asyncio.ensure_future(flight.get(1, work)) for _ in range(3)]
        await until(lambda: bool(begun), "the work begins")
        first.cancel()
        gate.set()
        assert await asyncio.gather(*others) == [7, 7, 7]
        assert begun == [1]
        assert 1 not in flight

    in_loop(test)
