"""A client's requests out of what was received at one stroke."""

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from blockstore.units import GIB, KIB, MIB
from nbd_server.request_parser import RECEIVE_BUFFER_BYTES, RequestParser
from nbd_server.terms import Terms
from nbd_server.transmission import refusal
from nbd_server.wire import Command, serialize_request

#: Kind and bytes of a request, and how many of them come at once.
SHAPES = {
    "1 read": (Command.READ, 4 * KIB, 1),
    "32 reads": (Command.READ, 4 * KIB, 32),
    "1 write": (Command.WRITE, 4 * KIB, 1),
    "30 writes": (Command.WRITE, 4 * KIB, 30),
    "1 write of 1 MiB": (Command.WRITE, MIB, 1),
}


def make_stream(command: Command, length: int, count: int) -> bytes:
    """As a client sends it."""
    payload = bytes(length) if command is Command.WRITE else b""
    return b"".join(serialize_request(command, 0, cookie, cookie * length, length) + payload for cookie in range(count))


def take_all(parser: RequestParser, stream: memoryview) -> int:
    """Receive all of it, as much at a time as there is memory for; how many requests it held."""
    taken = 0
    while stream:
        buffer = parser.buffer()
        count = min(len(buffer), len(stream))
        buffer[:count] = stream[:count]
        parser.received(count)
        stream = stream[count:]
        while parser.next_request() is not None:
            taken += 1
    return taken


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(group="parse NBD requests")
def test_parse(benchmark: BenchmarkFixture, shape: str) -> None:
    command, length, count = SHAPES[shape]
    stream = make_stream(command, length, count)
    assert count == 1 or len(stream) <= RECEIVE_BUFFER_BYTES
    parser = RequestParser(partial(refusal, size_bytes=GIB, read_only=False, terms=Terms()))
    assert benchmark(take_all, parser, memoryview(stream)) == count
