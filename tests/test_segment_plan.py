"""How volumes are cut into segments and grow; which segments a range lies in; where segments are placed."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.config import Placement
from blockstore.control.placement import REPLICAS, Candidate
from blockstore.control.placing import spread
from blockstore.control.segment_plan import MAX_SEGMENTS, check_segment_size, cut, grow
from blockstore.domain import NodeId
from blockstore.errors import CairnError, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, GIB, MAX_VOLUME_SIZE, MIB, TIB
from blockstore.volume.block_status import Changed
from blockstore.volume.segmented_blocks import SegmentedBlocks, pieces
from tests.memory_nbd import MemoryVolume

volume_sizes = st.integers(1, MAX_VOLUME_SIZE // BLOCK_SIZE).map(lambda blocks: blocks * BLOCK_SIZE)
segment_sizes = st.integers(1, MAX_VOLUME_SIZE // MIB).map(lambda extents: extents * MIB)


# ---- sizes


@given(volume_sizes, segment_sizes)
def test_a_new_volume_is_cut_into_full_segments_and_a_rest(size_bytes: int, segment_size_bytes: int) -> None:
    sizes = cut(size_bytes, segment_size_bytes)
    assert sum(sizes) == size_bytes
    assert 0 < len(sizes) <= MAX_SEGMENTS
    assert len(set(sizes[:-1])) <= 1
    assert all(size % MIB == 0 for size in sizes[:-1])
    assert sizes[-1] <= sizes[0]
    if size_bytes <= segment_size_bytes * MAX_SEGMENTS:
        assert all(size == segment_size_bytes for size in sizes[:-1])


@given(volume_sizes, st.lists(st.tuples(volume_sizes, segment_sizes), max_size=5), segment_sizes)
def test_a_volume_grows_in_its_last_segment_first_and_no_block_moves(
    first_bytes: int, resizes: list[tuple[int, int]], segment_size_bytes: int
) -> None:
    sizes = list(cut(first_bytes, segment_size_bytes))
    for size_bytes, now_bytes in resizes:
        if size_bytes < sum(sizes):
            continue
        plan = grow(sizes, size_bytes, now_bytes)
        assert plan.last_size_bytes >= sizes[-1]
        if plan.further_bytes:
            assert plan.last_size_bytes >= now_bytes
            assert plan.last_size_bytes % MIB == 0
        sizes = [*sizes[:-1], plan.last_size_bytes, *plan.further_bytes]
        assert sum(sizes) == size_bytes
        assert len(sizes) <= MAX_SEGMENTS
        assert all(size % MIB == 0 for size in sizes[:-1])


def test_examples_of_growth() -> None:
    assert cut(10 * GIB, 64 * GIB) == (10 * GIB,)
    assert cut(130 * GIB, 64 * GIB) == (64 * GIB, 64 * GIB, 2 * GIB)
    assert cut(64 * TIB, 64 * GIB) == (4 * TIB,) * 16
    assert grow([10 * GIB], 64 * GIB, 64 * GIB).further_bytes == ()
    assert grow([10 * GIB], 65 * GIB, 64 * GIB).last_size_bytes == 64 * GIB
    # Of a time before segments: it stays as it is, but for the rest of its extent.
    before = grow([100 * GIB + BLOCK_SIZE], 200 * GIB, 64 * GIB)
    assert (before.last_size_bytes, before.further_bytes) == (100 * GIB + MIB, (64 * GIB, 36 * GIB - MIB))


@pytest.mark.parametrize("wrong", [0, MIB - 1, MIB + BLOCK_SIZE, MAX_VOLUME_SIZE + MIB])
def test_a_segment_has_whole_extents(wrong: int) -> None:
    with pytest.raises(InvalidRequest, match="multiple of 1 MiB"):
        check_segment_size(wrong)


# ---- placement


def candidates(*zones: str) -> list[Candidate]:
    return [Candidate(NodeId(f"node-{number}"), zone, 100 * GIB) for number, zone in enumerate(zones)]


def test_segments_spread_over_all_nodes_and_each_over_three_zones() -> None:
    placed = spread(candidates("a", "b", "c", "d"), [GIB] * 8, Placement.STRICT)
    counts = Counter(node for each in placed for node in each.nodes)
    assert sorted(counts.values()) == [6, 6, 6, 6]
    assert all(len(set(each.nodes)) == REPLICAS for each in placed)


def test_two_nodes_of_one_zone_share_its_segments() -> None:
    placed = spread(candidates("a", "b", "c", "c"), [GIB] * 4, Placement.STRICT)
    counts = Counter(node for each in placed for node in each.nodes)
    assert sorted(counts.values()) == [2, 2, 4, 4]


# ---- ranges


@st.composite
def divided(draw: st.DrawFn) -> tuple[list[int], int]:
    """The blocks of each segment, and of all together."""
    counts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return counts, sum(counts)


def starts_of(counts: list[int]) -> list[int]:
    return [sum(counts[:number]) for number in range(len(counts))]


@given(divided(), st.data())
def test_pieces_are_the_range_and_each_lies_in_its_segment(parts: tuple[list[int], int], data: st.DataObject) -> None:
    counts, total = parts
    start = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - start))
    owner = [(index, block) for index, blocks in enumerate(counts) for block in range(blocks)]
    found = pieces(starts_of(counts), start, count)
    blocks = [(piece.index, piece.start + each) for piece in found for each in range(piece.count)]
    assert blocks == owner[start : start + count]
    assert len({piece.index for piece in found}) == len(found)


changes = st.lists(
    st.tuples(st.sampled_from(["write", "trim", "zero", "read"]), st.integers(0, 239), st.integers(1, 240)), max_size=20
)


@given(divided(), changes)
def test_segments_behave_as_one_volume(parts: tuple[list[int], int], todo: list[tuple[str, int, int]]) -> None:
    counts, total = parts

    async def test() -> None:
        segments = [MemoryVolume(count * BLOCK_SIZE) for count in counts]
        over: asyncio.Future[CairnError] = asyncio.get_running_loop().create_future()
        volume = SegmentedBlocks(segments, starts_of(counts), over)
        model = bytearray(total * BLOCK_SIZE)
        assert volume.size_bytes == len(model)
        for number, (kind, start, count) in enumerate(todo):
            first = start % total
            length = min(count, total - first)
            where = slice(first * BLOCK_SIZE, (first + length) * BLOCK_SIZE)
            if kind == "write":
                data = b"".join(bytes([number + 1, block % 251]) * 2048 for block in range(length))
                model[where] = data
                await volume.write(first, data)
            elif kind == "read":
                assert bytes(await volume.read(first, length)) == model[where]
            else:
                model[where] = bytes(length * BLOCK_SIZE)
                await (volume.trim(first, length) if kind == "trim" else volume.zero(first, length, allocate=True))
        assert bytes(await volume.read(0, total)) == model
        await volume.flush()

    asyncio.run(test())


def test_a_request_over_two_segments_fails_where_one_does_and_waits_for_both() -> None:
    async def test() -> None:
        class Failing(MemoryVolume):
            def write(self, start: int, data: bytes | bytearray | memoryview) -> "asyncio.Future[None]":
                raise QuorumUnavailable("two members are away")

        over: asyncio.Future[CairnError] = asyncio.get_running_loop().create_future()
        good = MemoryVolume(4 * BLOCK_SIZE)
        volume = SegmentedBlocks([Failing(4 * BLOCK_SIZE), good], [0, 4], over)
        with pytest.raises(QuorumUnavailable):
            await volume.write(3, bytes([1]) * (2 * BLOCK_SIZE))
        assert bytes(await good.read(0, 1)) == bytes([1]) * BLOCK_SIZE
        await volume.write(4, bytes(BLOCK_SIZE))
        over.set_result(QuorumUnavailable("it is over"))
        for request in (volume.write(4, bytes(BLOCK_SIZE)), volume.read(4, 1), volume.trim(4, 1), volume.flush()):
            with pytest.raises(QuorumUnavailable, match="over"):
                await request

    asyncio.run(test())


def test_what_segments_tell_is_put_together_and_one_that_is_younger_than_a_snapshot_has_changed() -> None:
    async def test() -> None:
        class Sealed(MemoryVolume):
            def changed(self, start: int, count: int, snapshot: str) -> "asyncio.Future[list[Changed]]":
                if snapshot != "snap":
                    raise NotFound(snapshot)
                return self._done([Changed(count, False)])

        over: asyncio.Future[CairnError] = asyncio.get_running_loop().create_future()
        parts = [Sealed(4 * BLOCK_SIZE), MemoryVolume(4 * BLOCK_SIZE)]
        volume = SegmentedBlocks(parts, [0, 4], over)
        await volume.write(3, bytes([1]) * (3 * BLOCK_SIZE))
        assert [(run.length, run.data) for run in await volume.shown(2, 5)] == [
            (1, False),
            (1, True),
            (2, True),
            (1, False),
        ]
        assert await volume.changed(2, 5, "snap") == [Changed(2, False), Changed(2, True), Changed(1, False)]
        with pytest.raises(NotFound):
            await volume.changed(2, 5, "another")
        over.set_result(QuorumUnavailable("it is over"))
        with pytest.raises(QuorumUnavailable):
            await volume.shown(0, 8)

    asyncio.run(test())
