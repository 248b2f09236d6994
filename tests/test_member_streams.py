"""What carries records and reads to a member, streams of messages and gRPC's: the same volume over both."""

import asyncio
import dataclasses
import random
import socket
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from blockstore.message_stream import Message
from blockstore.node import replica_streams
from blockstore.node.replica_streams import ReplicaStreams, _Reads
from blockstore.replication.reads import RUN
from blockstore.units import BLOCK_SIZE, MIB
from tests.stack import FAST, LIMIT_S, Stack, in_loop, running_stack, until

SIZE = 8 * MIB
BLOCKS = SIZE // BLOCK_SIZE
OVER_MESSAGES, OVER_GRPC = 0, -1


def is_served_over(directory: Path, streams: list[int]) -> None:
    """By all three nodes, over so many streams of messages to each, in any order."""

    async def test() -> None:
        async with running_stack(directory) as stack:
            volume = await stack.open(SIZE)
            await volume.write(5, b"x" * BLOCK_SIZE)
            await stack.until_all_whole(volume)
            for _ in range(3 * RUN):
                assert await volume.read(4, 3) == bytes(BLOCK_SIZE) + b"x" * BLOCK_SIZE + bytes(BLOCK_SIZE)
            # One that was given up for another is closed a beat later.
            await until(lambda: sorted(open_streams(stack)) == streams, f"{streams} streams are open")

    in_loop(test)


def open_streams(stack: Stack) -> list[int]:
    return [stack.streams(index).open_count for index in range(3)]


@pytest.mark.parametrize("port", [OVER_MESSAGES, OVER_GRPC])
def test_it_shows_what_a_bytearray_shows_while_nodes_restart(tmp_path: Path, port: int) -> None:
    chance, model = random.Random(port), bytearray(SIZE)

    async def test() -> None:
        async with running_stack(tmp_path, streams_port=port) as stack:
            volume = await stack.open(SIZE)
            for step in range(40):
                count = chance.choice((1, 1, 3, 64, 256))
                start = chance.randrange(BLOCKS - count)
                content = chance.randbytes(count * BLOCK_SIZE)
                await volume.write(start, content)
                model[start * BLOCK_SIZE : (start + count) * BLOCK_SIZE] = content
                asked = [(chance.randrange(BLOCKS - 300), 300), (start, count), (chance.randrange(BLOCKS), 1)]
                shown = await asyncio.gather(*(volume.read(first, blocks) for first, blocks in asked))
                for (first, blocks), data in zip(asked, shown, strict=True):
                    assert bytes(data) == model[first * BLOCK_SIZE : (first + blocks) * BLOCK_SIZE]
                if step % 13 == 12:
                    await stack.stop_node(step % 3)
                    await stack.start_node(step % 3)
            await stack.until_all_whole(volume)
            expected = [2, 2, 2] if port == OVER_MESSAGES else [0, 0, 0]
            await until(lambda: open_streams(stack) == expected, f"{expected} streams are open")

    in_loop(test)


def test_where_nobody_reaches_its_streams_a_node_is_asked_over_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(ReplicaStreams, "port", taken.getsockname()[1])
        is_served_over(tmp_path, [0, 0, 0])


def test_a_node_of_another_version_is_asked_over_grpc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_streams, "REPLICATE_GREETING", b"cairn 1 records")
    is_served_over(tmp_path, [0, 0, 0])


def test_a_port_behind_which_there_is_another_node_is_no_way_to_a_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where several nodes are behind one host's ports: the first one's is what all say."""
    asked: list[ReplicaStreams] = []

    def port_of_the_first(streams: ReplicaStreams) -> int:
        asked.append(streams)
        return asked[0]._server.port

    monkeypatch.setattr(ReplicaStreams, "port", property(port_of_the_first))
    is_served_over(tmp_path, [0, 0, 2])


def test_a_member_that_answers_no_read_is_given_up_and_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records are answered all the while."""
    hung: set[Any] = set()
    take = _Reads.take

    async def never() -> None:
        await asyncio.Event().wait()

    def hang_at_first(reads: _Reads, message: Message) -> Awaitable[None] | None:
        if len(hung) < 3:
            hung.add(reads)
        return never() if reads in hung else take(reads, message)

    monkeypatch.setattr(_Reads, "take", hang_at_first)

    async def test() -> None:
        async with running_stack(tmp_path, dataclasses.replace(FAST, retry_limit_s=LIMIT_S)) as stack:
            volume = await stack.open(SIZE)
            await volume.write(0, b"x" * BLOCK_SIZE)
            reading = [asyncio.ensure_future(volume.read(0, 1)) for _ in range(6)]
            await until(lambda: all(each.done() for each in reading), "the reads are answered")
            assert {each.result() for each in reading} == {b"x" * BLOCK_SIZE}
            assert hung

    in_loop(test)
