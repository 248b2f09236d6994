"""Throw-away clones: against a bytearray, beside each other, beyond their allowance, and after their end."""

import asyncio
import os
import random
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.errors import NoSpace
from blockstore.units import BLOCK_SIZE, MIB, TIB
from nbd_server import clone_overlay
from nbd_server.clone_overlay import BlockRanges, BlockSet, CloneOverlay, CloneSpace
from nbd_server.clone_volume import CloneVolume
from nbd_server.device import Device
from tests.memory_nbd import MemoryVolume

BLOCKS = 64
SIZE = BLOCKS * BLOCK_SIZE


class Clones:
    """Clones of one volume in memory, all in one allowance."""

    def __init__(self, directory: Path, limit_blocks: int) -> None:
        self.base = MemoryVolume(SIZE)
        self.original = random.Random(1).randbytes(SIZE)
        self.base.contents[:] = self.original
        self.space = CloneSpace(limit_blocks * BLOCK_SIZE)
        self._directory = directory

    def make(self) -> tuple[CloneOverlay, Device]:
        overlay = CloneOverlay(self._directory, BLOCKS, self.space)
        return overlay, Device(CloneVolume(self.base, overlay))


def run(directory: Path, test: Callable[[Clones], Awaitable[None]], limit_blocks: int = BLOCKS) -> None:
    async def all_of_it() -> None:
        clones = Clones(directory, limit_blocks)
        await test(clones)
        assert bytes(clones.base.contents) == clones.original
        assert (clones.space.used_blocks, clones.space.used_ranges) == (0, 0)
        assert not os.listdir(directory)

    asyncio.run(all_of_it())


@pytest.mark.parametrize("seed", range(4))
def test_it_is_a_bytearray_of_its_own(tmp_path: Path, seed: int) -> None:
    async def test(clones: Clones) -> None:
        chance = random.Random(seed)
        overlay, device = clones.make()
        model = bytearray(clones.original)
        for _ in range(150):
            offset = chance.randrange(SIZE)
            length = chance.randint(1, min(SIZE - offset, 5 * BLOCK_SIZE))
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                await device.write(offset, data)
                model[offset : offset + length] = data
            elif chance.random() < 0.5:
                await device.zero(offset, length, allocate=chance.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            else:
                first, last = -(-offset // BLOCK_SIZE) * BLOCK_SIZE, (offset + length) // BLOCK_SIZE * BLOCK_SIZE
                await device.trim(offset, length)
                model[first:last] = bytes(max(0, last - first))
            offset = chance.randrange(SIZE)
            length = chance.randint(1, SIZE - offset)
            assert await device.read(offset, length) == model[offset : offset + length]
        held = overlay.held.bits(0, BLOCKS)
        assert not held & overlay.zero.bits(0, BLOCKS)
        assert clones.space.used_blocks == held.bit_count()
        overlay.close()
        overlay.close()

    run(tmp_path, test)


def test_many_changes_at_once_leave_each_block_whole(tmp_path: Path) -> None:
    async def test(clones: Clones) -> None:
        overlay, device = clones.make()
        writes = [device.write(block * BLOCK_SIZE + 7, bytes([block]) * 100) for block in range(BLOCKS)]
        writes += [device.write(block * BLOCK_SIZE + 700, bytes([block]) * 100) for block in range(BLOCKS)]
        await asyncio.gather(*writes)
        model = bytearray(clones.original)
        for block in range(BLOCKS):
            for within in (7, 700):
                model[block * BLOCK_SIZE + within : block * BLOCK_SIZE + within + 100] = bytes([block]) * 100
        assert await device.read(0, SIZE) == model
        overlay.close()

    run(tmp_path, test)


def test_beyond_the_allowance_of_all_is_no_space_and_what_is_given_up_counts_no_more(tmp_path: Path) -> None:
    async def test(clones: Clones) -> None:
        (one, first), (other, second) = clones.make(), clones.make()
        await first.write(0, bytes(6 * BLOCK_SIZE))
        with pytest.raises(NoSpace, match="--clone-space"):
            await second.write(0, bytes(5 * BLOCK_SIZE))
        assert await second.read(0, SIZE) == clones.original  # nothing of it
        await first.write(0, b"x" * 6 * BLOCK_SIZE)  # over what is held already
        await first.trim(0, 2 * BLOCK_SIZE)
        await second.write(0, bytes(5 * BLOCK_SIZE))
        with pytest.raises(NoSpace):
            await second.write(6 * BLOCK_SIZE, bytes(2 * BLOCK_SIZE))
        one.close()
        await second.write(6 * BLOCK_SIZE, bytes(2 * BLOCK_SIZE))
        other.close()

    run(tmp_path, test, limit_blocks=10)


def test_a_full_disk_is_no_space_and_the_blocks_are_as_before(tmp_path: Path) -> None:
    async def test(clones: Clones) -> None:
        overlay, device = clones.make()
        overlay._file.close()
        overlay._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115, ASYNC230
        with pytest.raises(NoSpace, match="No space left"):
            await device.write(0, bytes(3 * BLOCK_SIZE))
        assert await device.read(0, SIZE) == clones.original
        overlay.close()

    run(tmp_path, test)


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 9_000), st.booleans()), max_size=12))
def test_a_set_of_blocks_is_a_set(changes: list[tuple[int, int, bool]]) -> None:
    blocks, ranges, model = BlockSet(), BlockRanges(), set[int]()
    for start, count, inside in changes:
        (blocks.add if inside else blocks.remove)(start, count)
        ranges.put(start, count, inside=inside)
        (model.update if inside else model.difference_update)(range(start, start + count))
    for start, count in ((0, 30_000), (4000, 200), (8191, 2)):
        expected = [each for each in sorted(model) if start <= each < start + count]
        assert blocks.bits(start, count) == sum(1 << each - start for each in expected)
        assert ranges.bits(start, count) == blocks.bits(start, count)
        assert [each for at, length in blocks.runs(start, count) for each in range(at, at + length)] == expected
    assert len(ranges) == sum(block - 1 not in model for block in model)


def test_zeroes_of_all_of_a_large_clone_take_no_memory_and_let_others_be_served(tmp_path: Path) -> None:
    """By one request: a client of its own volume could stop the front-end's other volumes by it."""
    size = 8 * TIB

    async def test() -> None:
        space = CloneSpace(MIB)
        overlay = CloneOverlay(tmp_path, size // BLOCK_SIZE, space)
        device = Device(CloneVolume(MemoryVolume(SIZE), overlay))
        for number in range(16):
            await device.write(number * size // 16, b"x" * BLOCK_SIZE)
        turns = 0

        async def be_served() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        serving = asyncio.create_task(be_served())
        tracemalloc.start()
        try:
            await device.trim(0, size)
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
            serving.cancel()
        assert turns > 100
        assert (space.used_blocks, space.used_ranges) == (0, 1)
        assert await device.read(size // 2, MIB) == bytes(MIB)
        overlay.close()

    asyncio.run(test())


def test_zeroes_in_more_pieces_than_all_clones_may_have_are_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(clones: Clones) -> None:
        (one, first), (other, second) = clones.make(), clones.make()
        for block in range(0, 6, 2):
            await first.trim(block * BLOCK_SIZE, BLOCK_SIZE)
        with pytest.raises(NoSpace, match="3 separate ranges of zeroes"):
            await second.trim(0, BLOCK_SIZE)
        assert await second.read(0, SIZE) == clones.original
        await second.write(0, b"x" * BLOCK_SIZE)
        one.close()
        await second.trim(0, SIZE)
        other.close()

    monkeypatch.setattr(clone_overlay, "MAX_RANGES", 3)
    run(tmp_path, test)


def test_it_tells_its_own_layer_over_the_snapshots(tmp_path: Path) -> None:
    async def test(clones: Clones) -> None:
        overlay, device = clones.make()
        await device.write(3 * BLOCK_SIZE, b"x" * 2 * BLOCK_SIZE)
        await device.trim(10 * BLOCK_SIZE, BLOCK_SIZE)
        assert [(run.length, run.data, run.depth) for run in await device.shown(0, SIZE)] == [
            (3, True, 2),
            (2, True, 1),
            (5, True, 2),
            (1, False, 1),
            (BLOCKS - 11, True, 2),
        ]
        overlay.close()

    run(tmp_path, test)
