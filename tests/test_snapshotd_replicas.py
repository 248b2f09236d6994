"""Sealed generations read from real nodes: what changed, what it holds, and the next replica where one is away."""

import asyncio
import socket
from pathlib import Path
from random import Random

import pytest

from blockstore.errors import NotFound, QuorumUnavailable
from blockstore.node.replica_streams import ReplicaStreams
from blockstore.rpc import control_pb2
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, BlockNumber
from blockstore.volume import generation_streams
from blockstore.volume.changes import Run
from blockstore.volume.open_volume import OpenVolume
from blockstore.volume.sealed_segment import NodeChannels, SealedSegment
from tests.snapshot_parts import snapshot_id
from tests.stack import LIMIT_S, VOLUME, Stack, in_loop, running_stack, until

SIZE = 16 * MIB


def segment_of(stack: Stack) -> control_pb2.Segment:
    """Where the replicas are now, as control would say."""
    segment = stack.where().segments[0]
    segment.size_bytes = SIZE
    return segment


async def write(volume: OpenVolume, start: int, data: bytes) -> None:
    await volume.write(BlockNumber(start), data)


async def sealed(volume: OpenVolume, number: int) -> int:
    return int((await volume.seal(snapshot_id(number).encode())).generation)


def test_changes_and_content_of_each_generation(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            old, new = Random(1).randbytes(3 * BLOCK_SIZE), Random(2).randbytes(BLOCK_SIZE)
            await write(volume, 100, old)
            await write(volume, 700, new)
            first = await sealed(volume, 1)
            await write(volume, 101, new)
            second = await sealed(volume, 2)
            await write(volume, 5, new)
            await stack.until_all_know(volume)
            channels = NodeChannels()
            segment = SealedSegment(VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, LIMIT_S)
            changes = await segment.list_changes(1, first)
            assert list(changes.runs()) == [Run(100, 3), Run(700, 1)]
            assert list((await segment.list_changes(first + 1, second)).runs()) == [Run(101, 1)]
            runs = [Run(99, 4), Run(700, 1)]
            assert await segment.read(first, runs) == bytes(BLOCK_SIZE) + old + new
            expected = bytes(BLOCK_SIZE) + old[:BLOCK_SIZE] + new + old[2 * BLOCK_SIZE :] + new
            assert await segment.read(second, runs) == expected
            with pytest.raises(NotFound):
                await segment.read(second + 1, [Run(5, 1)])
            await channels.close()

    in_loop(check)


def test_the_next_replica_is_asked_where_one_is_away(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            data = Random(3).randbytes(BLOCK_SIZE)
            await write(volume, 7, data)
            generation = await sealed(volume, 1)
            await stack.until_all_know(volume)
            channels = NodeChannels()
            segment = SealedSegment(VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, 5.0)
            for index in (0, 1):
                assert await segment.read(generation, [Run(7, 1)]) == data
                await stack.stop_node(index)
            assert await segment.read(generation, [Run(7, 1)]) == data
            await stack.stop_node(2)
            with pytest.raises(QuorumUnavailable):
                await segment.read(generation, [Run(7, 1)])
            await stack.start_node(1)
            segment.move(segment_of(stack))
            assert await segment.read(generation, [Run(7, 1)]) == data
            await channels.close()

    in_loop(check)


def test_a_generation_of_that_number_that_another_seal_made_is_not_taken_for_it(tmp_path: Path) -> None:
    """As a replica has it that was away when a loss was accepted: numbers are given anew then."""

    async def check() -> None:
        async with running_stack(tmp_path) as stack:
            volume = await stack.open(SIZE)
            await write(volume, 5, Random(1).randbytes(BLOCK_SIZE))
            generation = await sealed(volume, 1)
            await stack.until_all_know(volume)
            channels = NodeChannels()
            for name, is_it in ((snapshot_id(1), True), (snapshot_id(2), False)):
                where = VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, LIMIT_S
                segment = SealedSegment(*where, generation=generation, seal=name)
                if is_it:
                    assert list((await segment.list_changes(1, generation)).runs()) == [Run(5, 1)]
                    continue
                for asked in (segment.list_changes(1, generation), segment.read(generation, [Run(5, 1)])):
                    with pytest.raises(NotFound, match=f"that {name} sealed"):
                        await asked
            await channels.close()

    in_loop(check)


def test_nobody_to_ask() -> None:
    async def check() -> None:
        segment = SealedSegment(VOLUME, control_pb2.Segment(), 10, NodeChannels(), 1.0)
        with pytest.raises(QuorumUnavailable, match="control does not know"):
            await segment.list_changes(1, 1)

    in_loop(check)


def test_what_counts_fills_is_not_asked_of_a_replica_that_lacks_some(tmp_path: Path) -> None:
    """A snapshot without a base, of a volume whose source has ended: one member has not heard of the last fill."""

    async def check() -> None:
        async with running_stack(tmp_path, source=b"snap") as stack:
            volume = await stack.open(SIZE)
            old = Random(1).randbytes(BLOCK_SIZE)
            await write(volume, 5, old)
            first = await sealed(volume, 1)
            await stack.until_all_know(volume)
            await stack.hosted(2).checkpoint()
            await stack.stop_node(2)
            await volume.fill(7, old)
            await volume.hydrated()
            here = [stack.hosted(0), stack.hosted(1)]
            await until(lambda: all(each.follower.commit == volume.status().commit for each in here), "they know")
            for each in here:
                await each.checkpoint()
            await volume.close()
            await stack.start_node(2)
            channels = NodeChannels()
            segment = SealedSegment(VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, LIMIT_S)
            segment._best = stack.replicas[2]
            changes = await segment.list_changes(0, first)
            assert list(changes.runs()) == [Run(5, 1), Run(7, 1)]
            segment._best = stack.replicas[2]
            assert await segment.read(first, [Run(5, 3)]) == old + bytes(BLOCK_SIZE) + old
            await channels.close()

    in_loop(check)


# ---- over streams of messages


def open_streams(stack: Stack) -> int:
    """Beside the two of the front-end to each node."""
    return sum(stack.streams(index).open_count for index in range(3)) - 6


def test_reads_go_over_streams_once_a_node_has_said_where(tmp_path: Path) -> None:
    """As many as there are reads at once, each of its own content; they are kept for the next ones."""

    async def check() -> None:
        async with running_stack(tmp_path, streams_port=0) as stack:
            volume = await stack.open(SIZE)
            contents = [Random(number).randbytes(MIB) for number in range(4)]
            for number, data in enumerate(contents):
                await write(volume, number * 256, data)
            generation = await sealed(volume, 1)
            await stack.until_all_know(volume)
            channels = NodeChannels()
            member = segment_of(stack).configuration.members[0]

            async def read(number: int, generation: int = generation) -> bytes:
                target = pb.Target(volume=VOLUME, segment=0, replica=member.replica)
                ranges = [pb.BlockRange(start=number * 256, count=256)]
                request = pb.ReadGenerationRequest(target=target, generation=generation, ranges=ranges)
                return bytes((await channels.read_generation(member.address, request, LIMIT_S)).payload)

            assert await read(0) == contents[0]
            # A front-end whose nodes were not run for a while connects to them anew.
            await until(lambda: open_streams(stack) == 0, "the first answer says where, and opens none")
            for _ in range(3):
                assert await asyncio.gather(*map(read, range(4))) == contents
                await until(lambda: open_streams(stack) == 4, "there are as many as there were reads at once")
            with pytest.raises(NotFound):
                await read(0, generation + 1)
            await until(lambda: open_streams(stack) == 3, "the one that was refused ends")
            assert await asyncio.gather(*map(read, range(4))) == contents
            await channels.close()
            await until(lambda: open_streams(stack) == 0, "the streams to end")

    in_loop(check)


def test_a_node_that_started_anew_is_read_from_over_its_new_streams(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_stack(tmp_path, streams_port=0) as stack:
            volume = await stack.open(SIZE)
            data = Random(3).randbytes(BLOCK_SIZE)
            await write(volume, 7, data)
            generation = await sealed(volume, 1)
            await stack.until_all_know(volume)
            await volume.close()
            channels = NodeChannels()
            segment = SealedSegment(VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, LIMIT_S)
            for _ in range(2):
                assert await segment.read(generation, [Run(7, 1)]) == data
            for index in range(3):
                await stack.stop_node(index)
            with pytest.raises(QuorumUnavailable):
                await segment.read(generation, [Run(7, 1)])
            for index in range(3):
                await stack.start_node(index)
            segment.move(segment_of(stack))
            for _ in range(3):
                assert await segment.read(generation, [Run(7, 1)]) == data
            await until(lambda: sum(stack.streams(index).open_count for index in range(3)) == 1, "one stream is open")
            await channels.close()

    in_loop(check)


@pytest.mark.parametrize("why", ["it has none", "nobody listens there", "who listens there says nothing"])
def test_without_streams_generations_are_read_by_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(generation_streams, "_CONNECT_S", 0.2)

    async def check() -> None:
        async with running_stack(tmp_path, streams_port=-1) as stack:
            volume = await stack.open(SIZE)
            data = Random(3).randbytes(BLOCK_SIZE)
            await write(volume, 7, data)
            generation = await sealed(volume, 1)
            await stack.until_all_know(volume)
            with socket.create_server(("127.0.0.1", 0)) as silent:
                if why != "it has none":
                    port = silent.getsockname()[1] if "says nothing" in why else 1
                    monkeypatch.setattr(ReplicaStreams, "port", port)
                channels = NodeChannels()
                segment = SealedSegment(VOLUME, segment_of(stack), SIZE // BLOCK_SIZE, channels, LIMIT_S)
                for _ in range(3):
                    assert await segment.read(generation, [Run(7, 1)]) == data
                await channels.close()

    in_loop(check)
