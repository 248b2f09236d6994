"""A volume over the real stack: nodes come and go, front-ends follow each other, and no byte is lost."""

import asyncio
import dataclasses
import gc
import os
import random
from functools import partial
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

from blockstore.domain import Position
from blockstore.errors import Fenced, QuorumUnavailable
from blockstore.units import BLOCK_SIZE, MIB, TIB, Sequence
from blockstore.volume import open_volume
from tests.stack import FAST, LIMIT_S, Stack, in_loop, running_stack, until

SIZE = 16 * MIB
BLOCKS = SIZE // BLOCK_SIZE


def block(text: str) -> bytes:
    return text.encode().ljust(BLOCK_SIZE, b".")


def test_what_was_written_is_read(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            big = os.urandom(3 * MIB)
            await asyncio.gather(volume.write(0, block("first")), volume.write(100, big))
            assert await volume.read(0, 2) == block("first") + bytes(BLOCK_SIZE)
            assert await volume.read(100, 3 * MIB // BLOCK_SIZE) == big
            await volume.trim(100, 10)
            await volume.zero(120, 10, allocate=True)
            after = bytearray(big)
            for start in (0, 20):
                after[start * BLOCK_SIZE : (start + 10) * BLOCK_SIZE] = bytes(10 * BLOCK_SIZE)
            assert await volume.read(100, 3 * MIB // BLOCK_SIZE) == bytes(after)
            await volume.flush()

    in_loop(test)


def test_a_trim_of_more_than_a_record_can_name_is_several(tmp_path: Path) -> None:
    """A segment of 16 TiB and more has blocks that 32 bits do not number."""

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            blocks = 40 * TIB // BLOCK_SIZE
            volume = await stack.open(40 * TIB)
            for make_zero in (volume.trim, partial(volume.zero, allocate=True)):
                for start in (0, blocks // 2, blocks - 1):
                    await volume.write(start, block("content"))
                await make_zero(1, blocks - 1)
                assert await volume.read(0, 1) == block("content")
                for start in (blocks // 2, blocks - 1):
                    assert await volume.read(start, 1) == bytes(BLOCK_SIZE)

    in_loop(test)


def test_an_attachment_that_ended_leaves_no_connection_open(tmp_path: Path) -> None:
    """Without Python's search for circles, which runs once in hours in a daemon."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def connections() -> int:
        return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections("tcp"))

    async def attach_and_detach(stack: Stack, *, everyone: bool = False) -> None:
        volume = await stack.open(SIZE)
        await volume.write(0, block("a"))
        if everyone:
            await stack.until_all_whole(volume)
        await volume.read(0, 1)
        await volume.close()

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            await attach_and_detach(stack, everyone=True)
            await until(lambda: connections() == 0, "all connections are closed")
            before = descriptors()  # with what the first connection to each node opened for all
            for _ in range(3):
                await attach_and_detach(stack)
            await until(lambda: connections() == 0 and descriptors() <= before, "nothing is left open")

    gc.collect()
    gc.disable()
    try:
        in_loop(test)
    finally:
        gc.enable()


def test_it_is_all_there_after_every_node_was_restarted(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            data = os.urandom(MIB)
            await volume.write(7, data)
            await volume.close()
            for index in range(3):
                await stack.stop_node(index)
            for index in range(3):
                await stack.start_node(index)
            volume = await stack.open(SIZE)
            assert await volume.read(7, MIB // BLOCK_SIZE) == data

    in_loop(test)


def test_who_waits_for_members_to_hear_of_a_commit_does_not_outwait_the_attachment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockstore.volume.open_volume._KNOWN_S", 10 * LIMIT_S)

    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            end = volume.status().end
            never = Position(end.epoch, Sequence(end.sequence + 1000))
            waiting = asyncio.create_task(volume.wait_until_known(never))
            await volume.write(0, block("a"))
            assert not waiting.done()
            await volume.close()
            await asyncio.wait_for(waiting, LIMIT_S)

    in_loop(test)


@pytest.mark.parametrize("away", [0, 1, 2])
def test_writes_go_on_without_one_node_which_then_catches_up_from_the_log(tmp_path: Path, away: int) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, block("with all"))
            await stack.stop_node(away)
            for number in range(50):
                await volume.write(number, block(f"without one {number}"))
            await stack.start_node(away)
            await stack.until_all_whole(volume)
            for number in range(50):
                assert await volume.read(number, 1) == block(f"without one {number}")
            contents = {stack.hosted(index).store.read(0, 64) for index in range(3)}
            await until(
                lambda: len({bytes(stack.hosted(index).store.read(0, 64)) for index in range(3)}) == 1,
                f"the three replicas show the same, not {len(contents)} contents",
            )

    in_loop(test)


def test_a_long_absence_is_made_good_by_copying(tmp_path: Path) -> None:
    """The leader keeps little, and the peers' logs are in the tables: what is left is the difference."""

    async def test() -> None:
        leader = dataclasses.replace(FAST, retained_bytes=64 * 1024)
        async with running_stack(tmp_path, leader, checkpoint_s=0.1) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, os.urandom(MIB))
            await stack.stop_node(2)
            model = bytearray(SIZE)
            model[:MIB] = await volume.read(0, MIB // BLOCK_SIZE)
            seed = random.Random(7)
            for _ in range(100):
                start, data = seed.randrange(BLOCKS - 64), seed.randbytes(16 * BLOCK_SIZE)
                await volume.write(start, data)
                model[start * BLOCK_SIZE : start * BLOCK_SIZE + len(data)] = data
            await volume.trim(10, 20)
            model[10 * BLOCK_SIZE : 30 * BLOCK_SIZE] = bytes(20 * BLOCK_SIZE)
            await stack.start_node(2)
            await stack.until_all_know(volume)
            await stack.stop_node(0)
            await stack.stop_node(1)
            await volume.close()
            shown = b"".join(bytes(stack.hosted(2).store.read(at, 256)) for at in range(0, BLOCKS, 256))
            assert shown == model

    in_loop(test)


def test_below_a_quorum_requests_wait_and_then_fail_and_reads_come_back(tmp_path: Path) -> None:
    ahead_s = 0.0

    def later() -> float:
        return asyncio.get_running_loop().time() + ahead_s

    async def test() -> None:
        nonlocal ahead_s
        settings = dataclasses.replace(FAST, retry_limit_s=LIMIT_S)
        async with running_stack(tmp_path, settings) as stack:
            with patch.object(open_volume, "boot_time_s", later):
                volume = await stack.open(SIZE)
                await volume.write(3, block("before"))
                await stack.stop_node(0)
                await stack.stop_node(1)
                never = volume.write(4, block("never promised"))
                await asyncio.wait([never], timeout=0.5)
                assert not never.done()
                ahead_s += 2 * LIMIT_S
                with pytest.raises(QuorumUnavailable):
                    await never
                await stack.start_node(0)
                await stack.until_members(volume, 2)
                assert await volume.read(3, 1) == block("before")
                await volume.write(4, block("promised"))
                assert await volume.read(4, 1) == block("promised")

    in_loop(test)


def test_a_front_end_that_was_replaced_is_fenced(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            old = await stack.open(SIZE)
            await old.write(5, block("by the old one"))
            new = await stack.open(SIZE)
            assert await new.read(5, 1) == block("by the old one")
            await new.write(5, block("by the new one"))
            with pytest.raises(Fenced):
                await old.write(5, block("too late"))
            with pytest.raises(Fenced):
                await old.read(5, 1)
            assert isinstance(await old.over, Fenced)
            assert await new.read(5, 1) == block("by the new one")

    in_loop(test)


def test_a_sealed_generation_keeps_what_it_showed(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await volume.write(9, block("in the first layer"))
            generation = (await volume.seal(b"snap-0")).generation
            await volume.write(9, block("in the second"))
            await stack.until_all_whole(volume)
            for index in range(3):
                hosted = stack.hosted(index)
                await until(lambda hosted=hosted: hosted.follower.commit == volume.status().commit, "commit arrives")  # type: ignore[misc]
                await hosted.checkpoint()
                assert hosted.store.sealed.read(generation, 9, 1) == block("in the first layer")
                assert hosted.store.read(9, 1) == block("in the second")

    in_loop(test)
