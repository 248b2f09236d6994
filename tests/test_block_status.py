"""What an attached volume tells of its blocks, over real nodes: all that was acknowledged, and fast where sparse."""

import asyncio
import itertools
import random
import time
from pathlib import Path

from blockstore.domain import make_id
from blockstore.errors import NotFound
from blockstore.units import BLOCK_SIZE, MIB, TIB
from blockstore.volume.block_status import Changed, Shown
from blockstore.volume.open_volume import OpenVolume
from tests.restored import go_on, patient, restored_volume, until_hydrated
from tests.stack import in_loop, running_stack, until

SIZE = 64 * MIB
BLOCKS = SIZE // BLOCK_SIZE
FIRST, SECOND = make_id("snap", bytes(9)), make_id("snap", bytes(8) + b"2")


def filled(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count * BLOCK_SIZE)


def test_what_was_acknowledged_is_told_and_layers_are_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            assert await volume.shown(0, BLOCKS) == [Shown(BLOCKS, data=False, depth=0, here=True)]
            await volume.write(10, filled(4))
            await volume.seal(FIRST.encode())
            await volume.write(12, filled(4))
            await volume.trim(10, 1)
            assert await volume.shown(8, 12) == [
                Shown(2, False, 0, True),
                Shown(1, False, 1, True),  # zeroes, over what the snapshot has
                Shown(1, True, 2, True),
                Shown(4, True, 1, True),
                Shown(4, False, 0, True),
            ]
            assert await volume.changed(0, 20, FIRST) == [
                Changed(10, False),
                Changed(1, True),
                Changed(1, False),
                Changed(4, True),
                Changed(4, False),
            ]
            await volume.seal(SECOND.encode())
            assert await volume.snapshots() == {FIRST: 1, SECOND: 2}
            assert await volume.changed(0, BLOCKS, SECOND) == [Changed(BLOCKS, False)]
            assert [run.depth for run in await volume.shown(10, 6)] == [2, 3, 2]
            await volume.unpin((await volume.seal(b"third")).generation, b"third")
            try:
                await volume.changed(0, 1, make_id("snap", b"nobody999"))
            except NotFound as error:
                assert "keeps no snapshot" in str(error)  # noqa: PT017 - in a coroutine of its own
            else:
                raise AssertionError("a snapshot that nobody made")

    in_loop(test)


def test_members_that_go_away_are_not_missed(tmp_path: Path) -> None:
    """Each answer comes from a whole member as of the leader's commit, whoever is left."""

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            for turn in range(30):
                await volume.write(turn, filled(1))
                if turn == 10:
                    await stack.stop_node(1)
                if turn == 20:
                    await stack.start_node(1)
                    await until(lambda: not volume.why, "all members are back")
                    await stack.stop_node(2)
                runs = await volume.shown(0, turn + 1)
                assert runs == [Shown(turn + 1, True, 1, True)], turn

    in_loop(test)


def test_nothing_that_holds_data_is_told_as_a_hole_while_others_change(tmp_path: Path) -> None:
    """Even blocks are written once and stay; odd ones come and go, checkpoints come all the time."""

    async def test() -> None:
        async with running_stack(tmp_path, checkpoint_s=0.05) as stack:
            volume = await stack.open(SIZE)
            await asyncio.gather(*(volume.write(number, filled(1, number)) for number in range(0, 200, 2)))
            writing = asyncio.create_task(_come_and_go(volume))
            try:
                for _ in range(60):
                    at = 0
                    for run in await volume.shown(0, 200):
                        assert run.data or not any(number % 2 == 0 for number in range(at, at + run.length)), (at, run)
                        at += run.length
                    assert at == 200
            finally:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    in_loop(test)


async def _come_and_go(volume: OpenVolume) -> None:
    chance = random.Random(1)
    while True:
        number = chance.randrange(100) * 2 + 1
        await (volume.trim(number, 1) if chance.random() < 0.5 else volume.write(number, filled(1)))


def test_a_sparse_tebibyte_takes_less_time_than_its_reads_would(tmp_path: Path) -> None:
    """A thousand blocks, far apart; the whole map against reading just these."""

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(TIB)
            blocks = TIB // BLOCK_SIZE
            numbers = range(0, blocks, blocks // 1000)
            await asyncio.gather(*(volume.write(number, filled(1)) for number in numbers))
            for _ in range(5):  # the machine may stand still in the middle of one of them
                began = time.perf_counter()
                runs = await volume.shown(0, blocks)
                mapped_s = time.perf_counter() - began
                await asyncio.gather(*(volume.read(number, 1) for number in numbers))
                read_s = time.perf_counter() - began - mapped_s
                assert sum(run.length for run in runs if run.data) == len(numbers)
                assert sum(run.length for run in runs) == blocks
                if mapped_s < 10 * read_s:
                    break
            print(f"map of a TiB with {len(numbers)} blocks: {mapped_s:.3f} s; reading these: {read_s:.3f} s")
            assert mapped_s < 10 * read_s

    in_loop(test)


def depths_of_data(runs: list[Shown]) -> dict[int, int]:
    """By block. That of zeroes may change: what covered the source goes when that is needed no more."""
    ends = list(itertools.accumulate(run.length for run in runs))
    return {
        number: run.depth
        for run, end in zip(runs, ends, strict=True)
        if run.data
        for number in range(end - run.length, end)
    }


def test_a_restored_volume_tells_the_snapshots_blocks_until_and_after_they_have_come(tmp_path: Path) -> None:
    """Depths stay as they are when blocks come; only what is still to be fetched is not here."""

    async def test() -> None:
        content = {number: filled(1, number) for number in (*range(10), 100, 101, 300)}
        async with restored_volume(
            tmp_path, content, source_bytes=400 * BLOCK_SIZE, size_bytes=4 * MIB, leader=patient(20.0)
        ) as restored:
            attempt = await restored.attach()
            device = attempt.device
            await device.write(5 * BLOCK_SIZE, filled(1))
            await device.trim(100 * BLOCK_SIZE, BLOCK_SIZE)
            before = await device.shown(0, 4 * MIB)
            assert [(run.length, run.data, run.depth) for run in before] == [
                (5, True, 2),
                (1, True, 1),
                (4, True, 2),
                (90, False, 0),
                (1, False, 1),
                (1, True, 2),
                (198, False, 0),
                (1, True, 2),
                (1024 - 301, False, 0),
            ]
            assert [run.here for run in before] == [False, True, False, True, True, False, True, False, True]
            assert restored.source.fetched == [], "no content is asked for"
            await device.cache(0, 200 * BLOCK_SIZE)
            assert {start for start, _ in restored.source.fetched} == {0, 64}
            go_on(attempt)
            await until_hydrated(attempt)
            after = await device.shown(0, 4 * MIB)
            assert depths_of_data(after) == depths_of_data(before)
            assert all(run.here for run in after)

    in_loop(test)
