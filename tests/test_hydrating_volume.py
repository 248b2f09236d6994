"""A volume made from a snapshot shows the snapshot at once, and what its guest has changed on top, whatever happens."""

import asyncio
import os
import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

from blockstore.domain import ReplicaId
from blockstore.errors import Conflict, Corrupt, NoSpace, QuorumUnavailable
from blockstore.replication.messages import AppendAnswer, FencedBy, SealAnswer
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB
from blockstore.volume.member_session import AbsentRuns
from nbd_server.device import Device
from tests.restored import Restored, filled_blocks, go_on, patient, restored_volume, until_hydrated
from tests.stack import in_loop, until

SOURCE_BLOCKS = 700
SIZE = 4 * MIB
"""Larger than the source: the rest is zero."""


def random_blocks(*ranges: range) -> dict[int, bytes]:
    return {number: os.urandom(BLOCK_SIZE) for each in ranges for number in each}


BLOCKS = random_blocks(range(10), range(60, 300), range(512, 513), range(690, 700))


def over(directory: Path, retry_limit_s: float = 60.0, **node_settings: float) -> AbstractAsyncContextManager[Restored]:
    return restored_volume(
        directory,
        dict(BLOCKS),
        source_bytes=SOURCE_BLOCKS * BLOCK_SIZE,
        size_bytes=SIZE,
        leader=patient(retry_limit_s),
        **node_settings,
    )


def test_it_shows_the_snapshot_at_once_and_is_hydrated_in_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            shown = restored.source.content(SIZE)
            attempt = await restored.attach()
            assert await attempt.device.read(0, SIZE) == shown
            assert not attempt.report().hydrated
            go_on(attempt)
            await until_hydrated(attempt)
            await restored.source.stop()
            assert await attempt.device.read(0, SIZE) == shown
            progress = attempt.report().hydration
            assert progress.blocks_done == progress.blocks_total == len(BLOCKS)
            assert not progress.why

    in_loop(test)


def test_what_is_not_mapped_costs_no_call_and_what_is_fetched_is_fetched_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            device = (await restored.attach()).device
            assert await device.read(300 * BLOCK_SIZE, 200 * BLOCK_SIZE) == bytes(200 * BLOCK_SIZE)
            assert await device.read(SOURCE_BLOCKS * BLOCK_SIZE, MIB) == bytes(MIB)
            assert restored.source.fetched == []
            assert restored.source.maps == 1
            same = [device.read(128 * BLOCK_SIZE, BLOCK_SIZE) for _ in range(20)]
            near = [device.read(number * BLOCK_SIZE, BLOCK_SIZE) for number in range(129, 150)]
            for number, data in zip([*[128] * 20, *range(129, 150)], await asyncio.gather(*same, *near), strict=True):
                assert data == BLOCKS[number]
            await until(lambda: (128, 64) in restored.source.fetched, "the window was fetched")
            assert restored.source.fetched.count((128, 64)) == 1

    in_loop(test)


def test_what_was_read_is_filled_and_the_next_front_end_finds_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            await attempt.device.read(64 * BLOCK_SIZE, BLOCK_SIZE)
            await until(lambda: filled_blocks(attempt) == 64, "the window was filled")
            await restored.close()
            await restored.source.stop()
            device = (await restored.attach()).device
            for number in range(64, 128):
                assert await device.read(number * BLOCK_SIZE, BLOCK_SIZE) == BLOCKS[number]

    in_loop(test)


def test_a_guest_that_reads_on_finds_the_next_window_fetched(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            device = (await restored.attach()).device
            for number in range(64, 70):
                await device.read(number * BLOCK_SIZE, BLOCK_SIZE)
            await until(lambda: (128, 64) in restored.source.fetched, "the next window is fetched ahead")
            await device.read(200 * BLOCK_SIZE, BLOCK_SIZE)
            assert (256, 64) not in restored.source.fetched

    in_loop(test)


def test_the_guests_writes_and_trims_win(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            device, model = attempt.device, restored.source.content(SIZE)
            whole = os.urandom(20 * BLOCK_SIZE)
            await device.write(70 * BLOCK_SIZE, whole)
            model[70 * BLOCK_SIZE : 90 * BLOCK_SIZE] = whole
            assert restored.source.fetched == []
            await device.write(100 * BLOCK_SIZE + 100, b"in a block")
            model[100 * BLOCK_SIZE + 100 : 100 * BLOCK_SIZE + 110] = b"in a block"
            await device.trim(120 * BLOCK_SIZE, 300 * BLOCK_SIZE)
            model[120 * BLOCK_SIZE : 420 * BLOCK_SIZE] = bytes(300 * BLOCK_SIZE)
            await device.zero(2 * BLOCK_SIZE, 3 * BLOCK_SIZE, allocate=True)
            model[2 * BLOCK_SIZE : 5 * BLOCK_SIZE] = bytes(3 * BLOCK_SIZE)
            assert await device.read(0, SIZE) == model
            go_on(attempt)
            await until_hydrated(attempt)
            assert await device.read(0, SIZE) == model
            await restored.close()
            device = (await restored.attach(source=None)).device
            assert await device.read(0, SIZE) == model

    in_loop(test)


def test_an_answer_that_is_on_its_way_while_the_volume_becomes_hydrated_still_needs_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The member that was asked lacked the blocks: they are the source's, whatever was filled since."""
    late: list[tuple[int, memoryview, AbsentRuns]] = []

    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            arrived = attempt.volume.first.read_arrived_in_part
            monkeypatch.setattr(attempt.volume.first, "read_arrived_in_part", lambda *answer: late.append(answer))
            reading = attempt.device.read(64 * BLOCK_SIZE, 10 * BLOCK_SIZE)
            await until(lambda: bool(late), "the member has answered")
            go_on(attempt)
            await until_hydrated(attempt)
            arrived(*late[0])
            assert await reading == b"".join(BLOCKS[number] for number in range(64, 74))

    in_loop(test)


def test_members_know_of_the_sources_end_when_the_volume_is_said_to_be_hydrated(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            assert attempt.segments[0].hydration is not None
            go_on(attempt)
            await attempt.segments[0].hydration.hydrated
            assert not any(restored.stack.hosted(index).store.has_source for index in range(3))

    in_loop(test)


def test_the_background_waits_for_a_member_that_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would fill until that member is so far behind that it has to copy tables."""
    limit = 2 * MIB
    monkeypatch.setattr("blockstore.volume.hydration._LAG_BYTES", limit)

    async def test() -> None:
        blocks = random_blocks(range(64 * MIB // BLOCK_SIZE))
        async with restored_volume(tmp_path, blocks, source_bytes=64 * MIB, size_bytes=64 * MIB) as restored:
            attempt = await restored.attach()
            volume = attempt.volume.first
            slow, heard, late = volume.status().members[2].replica, volume.answered, list[Callable[[], None]]()

            def answered(replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None:
                if replica == slow:
                    late.append(partial(heard, replica, message))
                else:
                    heard(replica, message)

            monkeypatch.setattr(volume, "answered", answered)
            go_on(attempt)
            await until(lambda: filled_blocks(attempt) * BLOCK_SIZE > limit, "more is filled than it may lag")
            assert attempt.segments[0].hydrating is not None
            await attempt.segments[0].hydrating.fills.idle()
            # What was fetched by then comes on top: 16 MiB that wait, 4 in the log's queue, 4 calls of 1 MiB.
            assert restored.source.fetched_blocks * BLOCK_SIZE <= limit + 26 * MIB
            monkeypatch.setattr(volume, "answered", heard)
            for answer in late:
                answer()
            await until_hydrated(attempt)

    in_loop(test)


def test_a_write_that_races_a_fill_stays(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            device, model = attempt.device, restored.source.content(SIZE)
            await device.read(300 * BLOCK_SIZE, BLOCK_SIZE)  # the map is known from here on
            restored.source.answering.clear()
            reading = device.read(64 * BLOCK_SIZE, 64 * BLOCK_SIZE)
            await until(lambda: bool(restored.source.fetched), "the window is asked for")
            data = os.urandom(8 * BLOCK_SIZE)
            await device.write(70 * BLOCK_SIZE, data)
            model[70 * BLOCK_SIZE : 78 * BLOCK_SIZE] = data
            await device.trim(80 * BLOCK_SIZE, 4 * BLOCK_SIZE)
            model[80 * BLOCK_SIZE : 84 * BLOCK_SIZE] = bytes(4 * BLOCK_SIZE)
            restored.source.answering.set()
            writing = [
                device.write((64 + 8 * n) * BLOCK_SIZE, model[(64 + 8 * n) * BLOCK_SIZE :][:BLOCK_SIZE])
                for n in range(8)
            ]
            await asyncio.gather(reading, *writing)
            assert await device.read(0, SIZE) == model
            await until(lambda: filled_blocks(attempt) > 0, "the window was filled")
            assert await device.read(0, SIZE) == model

    in_loop(test)


def test_without_its_source_it_waits_fails_and_recovers(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path, retry_limit_s=60) as restored:
            attempt = await restored.attach()
            device = attempt.device
            assert attempt.segments[0].hydrating is not None
            attempt.segments[0].hydrating._retry_limit_s = 1.0  # of what the source has; the log's own stays long
            first = await device.read(0, 4 * BLOCK_SIZE)
            await until(lambda: filled_blocks(attempt) == sum(n < 64 for n in BLOCKS), "the window read is filled")
            await restored.source.stop()
            assert await device.read(0, 4 * BLOCK_SIZE) == first
            began = asyncio.get_running_loop().time()
            with pytest.raises(QuorumUnavailable):
                await device.read(64 * BLOCK_SIZE, BLOCK_SIZE)
            assert 0.5 < asyncio.get_running_loop().time() - began < 20
            attempt.segments[0].hydrating._retry_limit_s = 60.0
            go_on(attempt)
            await until(lambda: "snapshotd" in attempt.report().hydration.why, "the report says what is wrong")
            waiting = device.read(64 * BLOCK_SIZE, BLOCK_SIZE)
            await restored.source.start()
            assert await waiting == BLOCKS[64]

    in_loop(test)


def test_it_finds_the_source_at_another_address(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            await restored.source.stop()
            waiting = attempt.device.read(0, BLOCK_SIZE)
            restored.source.address = "127.0.0.1:0"
            await restored.source.start()
            attempt.heed(pb.CurrentAttachment(size_bytes=SIZE, source=restored.source.message))
            assert await waiting == BLOCKS[0]

    in_loop(test)


def test_damage_is_told_at_once_and_nothing_of_it_is_filled(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            restored.source.flip = True
            with pytest.raises(Corrupt):
                await attempt.device.read(0, BLOCK_SIZE)
            restored.source.flip = False
            restored.source.error = Corrupt("frame 3 of a pack fails its checksum")
            with pytest.raises(Corrupt, match="frame 3"):
                await attempt.device.read(0, BLOCK_SIZE)
            restored.source.error = None
            assert await attempt.device.read(0, BLOCK_SIZE) == BLOCKS[0]

    in_loop(test)


def test_hydrated_then_trimmed_a_stale_ticket_brings_nothing_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            go_on(attempt)
            await until_hydrated(attempt)
            await attempt.device.trim(0, SIZE)
            await restored.close()
            fetched = len(restored.source.fetched)
            attempt = await restored.attach()
            assert attempt.report().hydrated
            assert await attempt.device.read(0, SIZE) == bytes(SIZE)
            assert len(restored.source.fetched) == fetched

    in_loop(test)


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach(hydration=pb.Hydration(rate_bytes=MIB))
            await until(lambda: filled_blocks(attempt) > 0, "some of it is filled")
            await restored.close()
            restored.source.fetched.clear()
            attempt = await restored.attach(hydration=pb.Hydration())
            await until_hydrated(attempt)
            assert restored.source.fetched_blocks < len(BLOCKS)
            assert await attempt.device.read(0, SIZE) == restored.source.content(SIZE)

    in_loop(test)


def test_another_snapshot_than_the_one_it_was_made_from_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with over(tmp_path) as restored:
            ticket = restored.ticket()
            ticket.source.snapshot = "snap-" + "9" * 17
            with pytest.raises(Conflict, match="made from"):
                await restored.open(restored.front_end(), ticket)

    in_loop(test)


def test_guests_and_the_background_at_once(tmp_path: Path) -> None:
    """Eight guests, each with blocks of its own, while everything is hydrated behind them and a node comes and goes."""

    async def test() -> None:
        async with over(tmp_path, checkpoint_s=0.1) as restored:
            attempt = await restored.attach(hydration=pb.Hydration(rate_bytes=MIB))
            model = restored.source.content(SIZE)
            looked: list[int] = []
            guests = [asyncio.create_task(guest(attempt.device, model, number, looked)) for number in range(8)]
            await until(lambda: len(looked) > 8 * 15, "the guests have begun")
            await restored.stack.stop_node(1)
            await until(lambda: len(looked) > 8 * 40, "they go on without the node")
            await restored.stack.start_node(1)
            await asyncio.gather(*guests)
            go_on(attempt)
            await until_hydrated(attempt)
            assert await attempt.device.read(0, SIZE) == model

    in_loop(test)


async def guest(device: Device, model: bytearray, number: int, looked: list[int]) -> None:
    """Changes and reads the blocks number, number + 8, ... one after the other, and looks each time."""
    chance = random.Random(number)
    for _ in range(60):
        at = chance.randrange(number, SOURCE_BLOCKS, 8) * BLOCK_SIZE
        kind = chance.choice(["write", "part", "trim", "zero", "read"])
        if kind == "write":
            model[at : at + BLOCK_SIZE] = data = chance.randbytes(BLOCK_SIZE)
            await device.write(at, data)
        elif kind == "part":
            model[at + 10 : at + 20] = data = chance.randbytes(10)
            await device.write(at + 10, data)
        elif kind != "read":
            model[at : at + BLOCK_SIZE] = bytes(BLOCK_SIZE)
            await (device.trim(at, BLOCK_SIZE) if kind == "trim" else device.zero(at, BLOCK_SIZE, allocate=True))
        assert await device.read(at, BLOCK_SIZE) == model[at : at + BLOCK_SIZE], (number, kind, at)
        looked.append(at)


def test_a_pass_that_gains_nothing_is_made_again(tmp_path: Path) -> None:
    """Its fills fail, and what was thought to be there is not: in the end it is all there."""

    async def test() -> None:
        async with over(tmp_path) as restored:
            attempt = await restored.attach()
            hydrating = attempt.segments[0].hydrating
            assert hydrating is not None
            hydrating.present.add(0, SOURCE_BLOCKS)
            full = FullVolume()
            submit, hydrating.fills._volume = hydrating.fills._volume, full
            hydrating.fills.offer(0, memoryview(BLOCKS[0]))
            go_on(attempt)
            await until(lambda: full.refused > 1, "what was thought to be there is fetched all the same")
            hydrating.fills._volume = submit
            await until_hydrated(attempt)
            assert await attempt.device.read(0, SIZE) == restored.source.content(SIZE)

    in_loop(test)


class FullVolume:
    """Nodes without room: every fill fails. refused: how many."""

    def __init__(self) -> None:
        self.refused = 0

    def fill(self, start: int, data: bytes | memoryview) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(NoSpace("no room"))
        self.refused += 1
        return future
