"""What control asks of a front-end for snapshots: seals that happen once, barriers that hold, pins that end."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.domain import Position, ReplicaId, make_id
from blockstore.replication.messages import AppendAnswer, FencedBy, SealAnswer
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import replica_pb2
from blockstore.units import BLOCK_SIZE, MIB, Generation
from nbd_server.device import Device
from nbd_server.hold import Barriers
from tests.front_end_process import ServedFrontEnd, serving_front_end
from tests.memory_nbd import MemoryVolume
from tests.nbd_client import NbdClient, NbdError
from tests.stack import LIMIT_S, Stack, in_loop, running_stack, until
from tests.virtual_time import in_virtual_time

SIZE = 16 * MIB
SNAPSHOTS = [make_id("snap", bytes([number]) * 9) for number in range(4)]


@asynccontextmanager
async def attached(directory: Path, **settings: Any) -> AsyncIterator[tuple[Stack, ServedFrontEnd]]:
    """A volume that is served at epoch 1."""
    async with (
        running_stack(directory / "nodes") as stack,
        serving_front_end(directory / "fe", stack, **settings) as served,
    ):
        await served.open(stack.ticket(SIZE))
        yield stack, served


async def refused(call: Awaitable[Any], code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    assert error.value.code() is code, error.value.details()


async def described(served: ServedFrontEnd) -> replica_pb2.DescribeResponse:
    """What a replica says of everything that was sent so far."""
    attempt = next(iter(served.front_end._attachments))
    return await attempt.volume.first.members.describe(attempt.volume.first.status().end, LIMIT_S)


def kept_answers(served: ServedFrontEnd) -> int:
    """How many changes are done and wait for the end of the barrier to be acknowledged."""
    attempt = next(iter(served.front_end._attachments))
    return 0 if attempt.device.hold is None else len(attempt.device.hold._kept)


class Writer:
    """A guest that writes without end, one request after the other on each of several blocks."""

    def __init__(self, client: NbdClient, depth: int) -> None:
        self.acked = 0
        self._client = client
        self._tasks = [asyncio.create_task(self._write(block)) for block in range(depth)]

    async def _write(self, block: int) -> None:
        while True:
            await self._client.write(block * BLOCK_SIZE, os.urandom(BLOCK_SIZE))
            self.acked += 1

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


# ---- barriers


def test_while_it_holds_nothing_is_acknowledged_and_reads_go_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            client, reader = await served.client(), await served.client("disk")
            writer = Writer(client, depth=16)
            await until(lambda: writer.acked > 50, "the guest writes")
            await served.hold(1, "barrier")
            await until(lambda: kept_answers(served) == 16, "all that the guest has in flight is done and not answered")
            acked = writer.acked
            content = await reader.read(0, MIB)
            changes = [
                asyncio.create_task(change)
                for change in (reader.write(MIB, b"part"), reader.trim(2 * MIB, MIB), reader.write_zeroes(3 * MIB, 10))
            ]
            await until(lambda: kept_answers(served) == 16 + len(changes), "these are done and not answered, too")
            await served.seal(1, SNAPSHOTS[0])
            await reader.flush()
            assert len(content) == len(await reader.read(0, MIB))
            assert writer.acked == acked
            assert not any(change.done() for change in changes)
            assert await served.release(1, "barrier")
            await asyncio.gather(*changes)
            await until(lambda: writer.acked > acked + 50, "the guest goes on")
            assert await served.release(1, "barrier"), "the same answer to the same question"
            await writer.stop()

    in_loop(test)


def test_a_barrier_ends_by_itself_and_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            client = await served.client()
            await served.hold(1, "too long", limit_s=1.0)
            attempt = next(iter(served.front_end._attachments))
            assert attempt.device.hold is not None
            await client.write(0, bytes(BLOCK_SIZE))
            assert attempt.device.hold is None
            assert not await served.release(1, "too long")
            await refused(served.hold(1, "too long"), grpc.StatusCode.FAILED_PRECONDITION)
            await served.hold(1, "another")
            await refused(served.hold(1, "a third"), grpc.StatusCode.FAILED_PRECONDITION)
            await served.hold(1, "another")
            assert not await served.release(1, "a third")
            assert await served.release(1, "another")

    in_loop(test)


def test_holding_again_starts_the_limit_anew() -> None:
    async def test() -> None:
        barriers = Barriers(Device(MemoryVolume(MIB)))
        for _ in range(4):
            await barriers.hold("barrier", limit_s=2.0)
            await asyncio.sleep(1.9)
        assert barriers.release("barrier")
        await barriers.hold("another", limit_s=2.0)
        await asyncio.sleep(2.1)
        assert not barriers.release("another")

    in_virtual_time(test)


def test_a_member_that_is_slow_to_hear_of_a_seal_keeps_no_guest_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its answers none arrives until the guest has its own; still the barrier's end waits for them."""
    monkeypatch.setattr("blockstore.volume.open_volume._KNOWN_S", 2 * LIMIT_S)

    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            client = await served.client()
            volume = next(iter(served.front_end._attachments)).volume.first
            slow, heard, late = volume.status().members[2].replica, volume.answered, list[Callable[[], None]]()

            def answered(replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None:
                late.append(partial(heard, replica, message))
                if replica != slow:
                    late.pop()()

            await served.hold(1, "barrier")
            monkeypatch.setattr(volume, "answered", answered)
            writing = asyncio.create_task(client.write(0, bytes(BLOCK_SIZE)))
            await served.seal(1, SNAPSHOTS[0])
            released = asyncio.create_task(served.release(1, "barrier"))
            await writing
            said = len(late)
            await until(lambda: len(late) > said + 3, "others are heard, and the slow one speaks on")
            assert not released.done()
            monkeypatch.undo()
            for answer in late:
                answer()
            assert await released

    in_loop(test)


def test_a_volume_that_is_closed_keeps_no_guest_waiting(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            client = await served.client()
            await served.hold(1, "barrier")
            writing = asyncio.create_task(client.write(0, bytes(BLOCK_SIZE)))
            await until(lambda: kept_answers(served) == 1, "the write is done and not answered")
            await served.close(1)
            await writing
            await refused(served.release(1, "barrier"), grpc.StatusCode.NOT_FOUND)

    in_loop(test)


# ---- seals


def test_a_snapshot_is_sealed_once_and_pins_its_generation(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (stack, served):
            client = await served.client()
            await client.write(0, b"before".ljust(BLOCK_SIZE))
            both = await asyncio.gather(served.seal(1, SNAPSHOTS[0]), served.seal(1, SNAPSHOTS[0]))
            assert both[0] == both[1]
            first = both[0]
            assert (first.generation, first.position.epoch) == (1, 1)
            assert first.took_us > 0
            await client.write(0, b"after".ljust(BLOCK_SIZE))
            assert (await served.seal(1, SNAPSHOTS[1])).generation == 2
            found = await described(served)
            assert [(each.generation, each.argument.decode(), list(each.pins)) for each in found.sealed] == [
                (1, SNAPSHOTS[0], [SNAPSHOTS[0].encode()]),
                (2, SNAPSHOTS[1], [SNAPSHOTS[1].encode()]),
            ]
            content = stack.hosted(0).store
            await stack.hosted(0).checkpoint()
            assert bytes(content.sealed.read(Generation(1), 0, 1)).startswith(b"before")

    in_loop(test)


def test_once_it_is_answered_the_members_know_of_it_also_without_the_front_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (stack, served):
            generation = (await served.seal(1, SNAPSHOTS[0])).generation
            await served.front_end.close()
            for index in range(3):
                await stack.hosted(index).checkpoint()
                assert stack.hosted(index).store.sealed.read(Generation(generation), 0, 1) == bytes(BLOCK_SIZE)

    in_loop(test)


def test_after_the_front_end_was_lost_a_seal_is_found_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path / "nodes") as stack:
            async with serving_front_end(tmp_path / "one", stack) as served:
                await served.open(stack.ticket(SIZE))
                sealed = await served.seal(1, SNAPSHOTS[0])
            async with serving_front_end(tmp_path / "two", stack) as served:
                await served.open(stack.ticket(SIZE))
                again = await served.seal(2, SNAPSHOTS[0], again=True)
                assert (again.generation, again.position.sequence) == (sealed.generation, sealed.position.sequence)
                new = await served.seal(2, SNAPSHOTS[1], again=True)
                assert new.generation == sealed.generation + 1
                assert len((await described(served)).sealed) == 2

    in_loop(test)


def test_of_two_seals_for_one_snapshot_the_first_is_its_content(tmp_path: Path) -> None:
    """Control may have heard of the first one: what was fixed once stays."""

    async def test() -> None:
        async with running_stack(tmp_path / "nodes") as stack:
            async with serving_front_end(tmp_path / "one", stack) as served:
                await served.open(stack.ticket(SIZE))
                first = await served.seal(1, SNAPSHOTS[0])
                attempt = next(iter(served.front_end._attachments))
                second = await attempt.volume.first.seal(SNAPSHOTS[0].encode())
                assert second.generation == first.generation + 1
            async with serving_front_end(tmp_path / "two", stack) as served:
                await served.open(stack.ticket(SIZE))
                again = await served.seal(2, SNAPSHOTS[0], again=True)
                assert (again.generation, again.position.sequence) == (first.generation, first.position.sequence)

    in_loop(test)


def test_a_seal_of_which_nobody_knows_whether_it_happened_happens_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path, retry_limit_s=1.0) as (stack, served):
            await stack.stop_node(1)
            await stack.stop_node(2)
            await refused(served.seal(1, SNAPSHOTS[0]), grpc.StatusCode.UNAVAILABLE)
            await refused(served.seal(1, SNAPSHOTS[0]), grpc.StatusCode.UNAVAILABLE)
            ticket = stack.ticket(SIZE)
            await stack.start_node(1)
            await stack.start_node(2)
            ticket.segments[0].CopyFrom(stack.where().segments[0])
            await served.open(ticket)
            sealed = await served.seal(2, SNAPSHOTS[0], again=True)
            found = await described(served)
            assert [(each.generation, each.argument.decode()) for each in found.sealed] == [
                (sealed.generation, SNAPSHOTS[0])
            ]

    in_loop(test)


def test_a_seal_that_the_end_of_its_attachment_cuts_off_is_answered_at_once(tmp_path: Path) -> None:
    """As NotFound: control asks the next one then, as one that may have sealed already."""

    async def test() -> None:
        async with attached(tmp_path) as (stack, served):
            await stack.stop_node(1)
            await stack.stop_node(2)
            sealing = asyncio.create_task(served.seal(1, SNAPSHOTS[0]))
            attempt = next(iter(served.front_end._attachments))
            await until(
                lambda: attempt.volume.first.status().end > attempt.volume.first.status().commit,
                "the seal is on its way",
            )
            await served.close(1)
            async with asyncio.timeout(LIMIT_S / 2):
                await refused(sealing, grpc.StatusCode.NOT_FOUND)

    in_loop(test)


def test_a_volume_that_is_closed_before_it_is_served_is_answered_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path / "nodes") as stack, serving_front_end(tmp_path / "fe", stack) as served:
            await stack.stop_node(1)
            await stack.stop_node(2)
            opening = asyncio.create_task(served.open(stack.ticket(SIZE)))
            await until(lambda: bool(list(served.front_end._attachments)), "the volume is being opened")
            await served.close(1)
            async with asyncio.timeout(LIMIT_S / 2):
                await refused(opening, grpc.StatusCode.ABORTED)

    in_loop(test)


def test_unpinning_is_sequenced_and_may_be_repeated(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            generation = (await served.seal(1, SNAPSHOTS[0])).generation
            for _ in range(2):
                await served.unpin(1, generation, SNAPSHOTS[0])
            assert not [pin for each in (await described(served)).sealed for pin in each.pins]

    in_loop(test)


def test_what_is_not_served_at_that_epoch_is_not_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            for call in (
                served.seal(2, SNAPSHOTS[0]),
                served.hold(2, "barrier"),
                served.release(2, "barrier"),
                served.unpin(2, 1, SNAPSHOTS[0]),
            ):
                await refused(call, grpc.StatusCode.NOT_FOUND)
            await refused(served.seal(1, "snap-1"), grpc.StatusCode.INVALID_ARGUMENT)
            await refused(served.hold(1, ""), grpc.StatusCode.INVALID_ARGUMENT)
            await refused(served.hold(1, "b", limit_s=1000), grpc.StatusCode.INVALID_ARGUMENT)

    in_loop(test)


# ---- maintenance


def test_under_maintenance_it_is_sealed_and_not_exported_until_a_guest_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path / "nodes") as stack, serving_front_end(tmp_path / "fe", stack) as served:
            ticket = stack.ticket(SIZE)
            ticket.maintenance = True
            await served.open(ticket)
            attempt = next(iter(served.front_end._attachments))
            assert attempt.report().state == pb.SERVING_STATE_SERVING
            with pytest.raises(NbdError):
                await served.client()
            await served.hold(1, "barrier")
            await served.seal(1, SNAPSHOTS[0])
            assert await served.release(1, "barrier")
            await served.open(stack.ticket(SIZE))
            client = await served.client()
            await client.write(0, bytes(BLOCK_SIZE))
            await refused(served.seal(1, SNAPSHOTS[1]), grpc.StatusCode.NOT_FOUND)

    in_loop(test)


def test_the_position_of_a_seal_has_what_was_acknowledged_before_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served):
            client = await served.client()
            writer = Writer(client, depth=8)
            await until(lambda: writer.acked > 20, "the guest writes")
            attempt = next(iter(served.front_end._attachments))
            before = attempt.volume.first.status().commit
            sealed = await served.seal(1, SNAPSHOTS[0])
            assert before < Position(sealed.position.epoch, sealed.position.sequence)  # type: ignore[arg-type]
            assert 0 < sealed.took_us < LIMIT_S * 1e6
            await writer.stop()

    in_loop(test)
