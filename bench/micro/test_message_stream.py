"""Messages between leader and member: framing, and the encoding of a batch of records in one."""

import asyncio
from collections.abc import Iterable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.micro.records import EPOCH, record, write
from blockstore.append_codec import decode_append, encode_append
from blockstore.errors import CairnError
from blockstore.message_stream import MessageStream
from blockstore.replication.messages import Append
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB

#: Bytes of a message, and how many arrive at once.
SHAPES = {"1 of 4 KiB": (BLOCK_SIZE, 1), "24 of 4 KiB": (BLOCK_SIZE, 24), "1 of 1 MiB": (MIB, 1)}
BATCHES = {"1 block": 1, "32 scattered blocks": 32}


class Wire(asyncio.Transport):
    """Keeps what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[bytes | bytearray | memoryview] = []

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.parts.extend(list_of_data)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """It takes all."""


class End:
    """One end of a stream that counts what arrives."""

    def __init__(self) -> None:
        self.arrived = 0
        self.wire = Wire()
        self.stream = MessageStream(self._count, _fail)
        self.stream.connection_made(self.wire)

    def _count(self, _: bytes | bytearray) -> None:
        self.arrived += 1

    def receive(self, content: memoryview) -> None:
        """As a transport hands it over."""
        while content:
            buffer = self.stream.get_buffer(-1)
            count = min(len(buffer), len(content))
            buffer[:count] = content[:count]
            self.stream.buffer_updated(count)
            content = content[count:]


def _fail(error: CairnError) -> None:
    raise error


@pytest.mark.benchmark(group="send a message of 4 KiB in three parts, without the network")
def test_send(benchmark: BenchmarkFixture) -> None:
    end = End()

    def send() -> None:
        end.wire.parts.clear()
        end.stream.send(b"head", b"tag", bytes(BLOCK_SIZE))

    benchmark(send)
    assert sum(map(len, end.wire.parts)) == 4 + 7 + BLOCK_SIZE


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(group="messages out of what was received")
def test_receive(benchmark: BenchmarkFixture, shape: str) -> None:
    size, count = SHAPES[shape]
    sender, receiver = End(), End()
    for _ in range(count):
        sender.stream.send(bytes(size))
    content = b"".join(sender.wire.parts)
    benchmark(receiver.receive, memoryview(content))
    assert receiver.arrived > 0 == receiver.arrived % count


def _append(blocks: int) -> Append:
    made = record(1, [write(number * 9) for number in range(blocks)])
    return Append(EPOCH, 1, 1, made.position, made.position, (made,))


def _encode(append: Append) -> list[bytes | memoryview]:
    return encode_append(append, lambda _: pb.Peer())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.benchmark(group="encode a message with a record")
def test_encode(benchmark: BenchmarkFixture, batch: str) -> None:
    assert benchmark(_encode, _append(BATCHES[batch]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.benchmark(group="decode a message with a record, checksums included")
def test_decode(benchmark: BenchmarkFixture, batch: str) -> None:
    append = _append(BATCHES[batch])
    message = b"".join(_encode(append))
    assert benchmark(decode_append, message).message == append
