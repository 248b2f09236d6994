"""A front-end with a volume of two segments on real nodes: seals behind a barrier, growth, the end of an epoch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from blockstore.domain import Configuration, Member, NodeId, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId, make_id
from blockstore.rpc import control_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, Epoch
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.ticket import Ticket
from nbd_server.attempt import Attempt
from nbd_server.limits import Limits
from tests.front_end_process import ServedFrontEnd, serving_front_end
from tests.nbd_client import Disconnected, NbdClient, NbdError
from tests.stack import LIMIT_S, VOLUME, Stack, in_loop, running_stack, until

SEGMENT = 8 * MIB
SNAPSHOTS = [make_id("snap", bytes([number]) * 9) for number in range(4)]
SECOND = [ReplicaId(make_id("rep", bytes([16 + index]) * 9)) for index in range(3)]
ESHUTDOWN = 108


async def create_second(stack: Stack) -> None:
    """The replicas of a second segment, empty."""
    for index, replica in enumerate(SECOND):
        await stack._nodes[index].node.create(ReplicaAddress(VOLUME, SegmentNumber(1), replica), filling=False)


def with_second(stack: Stack, ticket: pb.OpenTicket) -> pb.OpenTicket:
    """The same ticket with the second segment behind the first."""
    ticket.size_bytes = 2 * SEGMENT
    ticket.segments[0].size_bytes = SEGMENT
    further = ticket.segments.add(number=1, size_bytes=SEGMENT)
    further.configuration.CopyFrom(ticket.segments[0].configuration)
    for member, replica in zip(further.configuration.members, SECOND, strict=True):
        member.replica = replica
    return ticket


def attempt_of(served: ServedFrontEnd) -> Attempt:
    return next(iter(served.front_end._attachments))


@asynccontextmanager
async def attached(directory: Path) -> AsyncIterator[tuple[Stack, ServedFrontEnd, NbdClient]]:
    """Both segments, served at epoch 1."""
    async with (
        running_stack(directory / "nodes") as stack,
        serving_front_end(directory / "fe", stack) as served,
    ):
        await create_second(stack)
        await served.open(with_second(stack, stack.ticket(SEGMENT)))
        client = await served.client()
        yield stack, served, client
        await client.close()


@asynccontextmanager
async def without_a_quorum(directory: Path) -> AsyncIterator[tuple[ServedFrontEnd, "asyncio.Task[None]"]]:
    """A volume at epoch 1, and a client's write that cannot end."""
    async with (
        running_stack(directory / "nodes") as stack,
        serving_front_end(directory / "fe", stack, limits=Limits(drain_s=1.5)) as served,
    ):
        await served.open(stack.ticket(SEGMENT))
        client = await served.client()
        for node in (1, 2):
            await stack.stop_node(node)
        write = asyncio.create_task(client.write(0, b"no quorum".ljust(BLOCK_SIZE)))
        await until(lambda: served.front_end._attachments._server.in_flight_requests == 1, "it is in flight")
        yield served, write


def test_it_is_sealed_only_while_its_writes_are_held(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (_, served, client):
            assert client.size_bytes == 2 * SEGMENT
            await client.write(SEGMENT - BLOCK_SIZE, b"over the boundary" * 1000)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await served.seal(1, SNAPSHOTS[0])
            assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            await served.hold(1, "barrier")
            sealed = await served.seal(1, SNAPSHOTS[0])
            assert [(each.segment, each.generation) for each in sealed.segments] == [(0, 1), (1, 1)]
            assert await served.release(1, "barrier")
            assert (await client.read(SEGMENT - BLOCK_SIZE, 17_000)) == b"over the boundary" * 1000

    in_loop(test)


def test_generations_are_each_segments_own(tmp_path: Path) -> None:
    """A snapshot that failed when one segment was sealed puts it ahead; its pins are found and taken away in both."""

    async def test() -> None:
        async with attached(tmp_path) as (stack, served, _):
            first, second = attempt_of(served).volume.segments
            await first.seal(SNAPSHOTS[0].encode())
            await served.hold(1, "barrier")
            sealed = await served.seal(1, SNAPSHOTS[1])
            await served.release(1, "barrier")
            assert [each.generation for each in sealed.segments] == [2, 1]
            request = pb.SealVolumeRequest(
                front_end=served.front_end.id,
                volume=VOLUME,
                epoch=1,
                snapshot=SNAPSHOTS[0],
                again=True,
                given_up=True,
            )
            given_up = await served.stub.SealVolume(request, timeout=LIMIT_S)
            assert [each.generation for each in given_up.segments] == [1, 2]
            unpin = pb.UnpinGenerationRequest(
                front_end=served.front_end.id,
                volume=VOLUME,
                epoch=1,
                generation=1,
                generations=[1, 2],
                snapshot=SNAPSHOTS[0],
            )
            await served.stub.UnpinGeneration(unpin, timeout=LIMIT_S)
            pins = []
            for segment in (first, second):
                found = await segment.members.describe(segment.status().end, LIMIT_S)
                pins.append({each.generation: list(each.pins) for each in found.sealed if each.pins})
            assert pins == [{2: [SNAPSHOTS[1].encode()]}, {1: [SNAPSHOTS[1].encode()]}]
            await stack.hosted(0).checkpoint()

    in_loop(test)


def test_once_one_segment_is_fenced_nothing_of_the_others_is_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with attached(tmp_path) as (stack, served, client):
            await client.write(0, bytes(BLOCK_SIZE))
            members = tuple(Member(replica, NodeId(make_id("node", bytes(9)))) for replica in SECOND)
            addresses = dict(zip(SECOND, stack.addresses().values(), strict=True))

            async def refresh() -> dict[ReplicaId, str]:
                return addresses

            ticket = Ticket(VOLUME, SegmentNumber(1), SEGMENT, Epoch(2), Configuration(1, members), addresses, {})
            taken = OpenVolume(ticket, stack.leader_settings, 5.0, refresh)
            await taken.wait_until_served()
            attempt = attempt_of(served)
            await until(attempt.volume.over.done, "the attachment is over")
            with pytest.raises(NbdError, match=str(ESHUTDOWN)):
                await client.write(0, bytes(BLOCK_SIZE))
            with pytest.raises(NbdError, match=str(ESHUTDOWN)):
                await client.read(0, BLOCK_SIZE)
            assert attempt.report().state == pb.SERVING_STATE_FENCED
            await taken.close()

    in_loop(test)


def test_it_grows_by_a_segment_while_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with (
            running_stack(tmp_path / "nodes") as stack,
            serving_front_end(tmp_path / "fe", stack) as served,
        ):
            ticket = stack.ticket(SEGMENT // 2)
            await served.open(ticket)
            client = await served.client()
            await client.write(0, b"before".ljust(BLOCK_SIZE))
            attachments, attempt = served.front_end._attachments, attempt_of(served)
            refused = [pb.OpenTicket()]

            async def get_attachment(volume: VolumeId, epoch: int) -> pb.OpenTicket:
                assert (volume, epoch) == (VOLUME, 1)
                return refused.pop() if refused else with_second(stack, ticket)

            monkeypatch.setattr(attachments, "_ask_control", get_attachment)
            current = pb.CurrentAttachment(volume=VOLUME, epoch=1, size_bytes=2 * SEGMENT)
            await create_second(stack)
            # An answer that makes no sense changes nothing; the next heartbeat brings it up again.
            await served.front_end._heed({VOLUME: current}, {VOLUME: 1})
            await until(lambda: not served.front_end._growing, "the first attempt has ended")
            assert attempt.volume.size_bytes == SEGMENT // 2
            await served.front_end._heed({VOLUME: current}, {VOLUME: 1})
            await until(lambda: attempt.volume.size_bytes == 2 * SEGMENT, "it has the new size")
            seen = await served.client()
            assert seen.size_bytes == 2 * SEGMENT
            await asyncio.gather(*(seen.write(at, b"after".ljust(2 * BLOCK_SIZE)) for at in (SEGMENT - BLOCK_SIZE, 0)))
            assert (await client.read(0, 5), await client.read(SEGMENT - BLOCK_SIZE, 5)) == (b"after", b"after")
            assert len(attempt.report().members) == 6
            await client.close()
            await seen.close()

    in_loop(test)


def test_clients_that_take_their_time_to_go_keep_the_front_end_from_nothing_else(tmp_path: Path) -> None:
    """Its heartbeat speaks for all volumes: while it stood still for one that was taken away, all others were lost."""

    async def test() -> None:
        async with without_a_quorum(tmp_path) as (served, write):
            for _ in range(3):
                await served.front_end._heed({}, {VOLUME: 1})
            # Its client still has its time to go; had any of these waited for it, that would be over.
            assert served.front_end._closing.keys() == {(VOLUME, 1)}
            with pytest.raises(Disconnected):
                await write
            await until(lambda: not list(served.front_end._attachments), "it is closed, long before the write's limit")
            assert not served.front_end._closing

    in_loop(test)


def test_a_close_that_its_caller_gives_up_goes_on_and_is_joined(tmp_path: Path) -> None:
    """Begun anew by each call, it would never end where clients take longer than control waits."""

    async def test() -> None:
        async with without_a_quorum(tmp_path) as (served, write):
            request = pb.CloseVolumeRequest(front_end=served.front_end.id, volume=VOLUME, epoch=1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(served.front_end.CloseVolume(request, None), 0.2)  # type: ignore[arg-type]
            [report] = served.front_end._attachments.reports()
            assert report.clients == 1
            [closing] = served.front_end._closing.values()
            assert (await served.front_end.CloseVolume(request, None)).closed  # type: ignore[arg-type]
            assert closing.result()
            with pytest.raises(Disconnected):
                await write

    in_loop(test)
