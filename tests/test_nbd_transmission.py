"""The transmission phase's parser, its rules and its errors, without a socket."""

import errno
import itertools
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore import errors
from blockstore.units import MIB
from nbd_server import wire
from nbd_server.commands import memory_bytes
from nbd_server.request_parser import MAX_SKIPPED_BYTES, TRANSITIONS, RequestParser, State, Step
from nbd_server.terms import Context, Style, Terms
from nbd_server.transmission import MAX_REQUEST_BYTES, RULES, Request, refusal, wire_error
from nbd_server.wire import Command, CommandFlag, WireError

SIZE = 64 * MIB


def parser_of(size_bytes: int = SIZE, read_only: bool = False, buffer_bytes: int = 1024) -> RequestParser:
    return RequestParser(lambda request: refusal(request, size_bytes, read_only, Terms()), Style.SIMPLE, buffer_bytes)


def error_of(request: Request) -> int:
    return request.refusal.error if request.refusal is not None else WireError.NONE


def feed(parser: RequestParser, data: bytes, sizes: Iterable[int] = ()) -> list[Request]:
    """Receive `data` in pieces of those sizes, then in the largest that fit; the requests that came of it."""
    requests: list[Request] = []
    pieces = iter(sizes)
    rest = memoryview(data)
    while rest:
        buffer = parser.buffer()
        count = min(len(rest), len(buffer), next(pieces, len(rest)))
        buffer[:count] = rest[:count]
        parser.received(count)
        rest = rest[count:]
        requests += iter(parser.next_request, None)
        if parser.state is State.CLOSED:
            break
    return requests


def serialize(request: Request) -> bytes:
    header = wire.serialize_request(request.command, request.flags, request.cookie, request.offset, request.length)
    return header + bytes(request.payload or b"")


def write_of(payload: bytes, cookie: int = 0, offset: int = 0) -> Request:
    return Request(Command.WRITE, 0, cookie, offset, len(payload), payload)


# The parser.

HEADERS = st.tuples(
    st.sampled_from([Command.READ, Command.FLUSH, Command.TRIM, Command.WRITE_ZEROES, 5, 77]),
    st.integers(0, 3),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, SIZE),
    st.integers(0, (1 << 32) - 1),
).map(lambda fields: Request(*fields))
WRITES = st.builds(write_of, st.binary(max_size=3000), st.integers(0, (1 << 64) - 1), st.integers(0, SIZE + 5000))


@given(st.lists(st.one_of(HEADERS, WRITES), max_size=12), st.lists(st.integers(1, 500), max_size=60))
def test_requests_come_out_as_they_went_in_however_they_are_cut(sent: list[Request], sizes: list[int]) -> None:
    stream = b"".join(map(serialize, sent))
    got = feed(parser_of(), stream, sizes)
    assert len(got) == len(sent)
    for before, after in zip(sent, got, strict=True):
        assert replace(after, payload=None, refusal=None) == replace(before, payload=None)
        assert after.refusal == refusal(before, SIZE, False, Terms())
        if after.command == Command.WRITE and after.refusal is None:
            assert bytes(after.payload or b"") == (before.payload or b"")
        else:
            assert after.payload is None


@given(st.binary(max_size=300))
def test_any_bytes_make_requests_or_break_the_protocol(data: bytes) -> None:
    parser = parser_of()
    try:
        feed(parser, data)
    except wire.ProtocolError:
        assert parser.state is State.CLOSED
    assert parser.next_request() is None or data[:4] == wire.REQUEST_MAGIC.to_bytes(4, "big")


def test_a_large_payload_is_received_where_it_stays() -> None:
    """Once the header is through, the buffer is the payload's own memory, and never reaches beyond it."""
    parser = parser_of()
    payload = bytes(range(256)) * 4096
    assert feed(parser, serialize(write_of(payload))[: 28 + 100]) == []
    assert parser.receiving is not None
    assert len(parser.buffer()) == len(payload) - 100
    (request,) = feed(parser, payload[100:])
    assert isinstance(request.payload, bytearray)
    assert request.payload == payload
    assert parser.receiving is None


def test_payloads_are_not_shared_with_what_comes_next() -> None:
    parser = parser_of()
    first, second = feed(parser, serialize(write_of(b"a" * 100)) + serialize(write_of(b"b" * 100)))
    feed(parser, serialize(write_of(b"c" * 900)))
    assert (first.payload, second.payload) == (b"a" * 100, b"b" * 100)


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_a_length_beyond_the_limit_is_refused_before_memory_is_made(command: Command) -> None:
    parser = parser_of(1 << 40)
    header = wire.serialize_request(command, 0, 1, 0, MAX_REQUEST_BYTES + 1)
    tracemalloc.start()
    try:
        got = feed(parser, header + bytes(2000) * (command == Command.WRITE))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    if command == Command.READ:
        assert [error_of(request) for request in got] == [WireError.EINVAL]
    else:
        assert (got, parser.state) == ([], State.SKIPPING)


def test_a_refused_write_is_skipped_and_what_follows_is_understood() -> None:
    parser = parser_of()
    refused = wire.serialize_request(Command.WRITE, 0, 1, 0, MAX_REQUEST_BYTES + 1) + bytes(MAX_REQUEST_BYTES + 1)
    beyond = serialize(write_of(b"x" * 5000, cookie=2, offset=SIZE - 4999))
    got = feed(parser, refused + beyond + serialize(write_of(b"y", cookie=3)))
    assert [(request.cookie, error_of(request)) for request in got] == [
        (1, WireError.EINVAL),
        (2, WireError.ENOSPC),
        (3, WireError.NONE),
    ]


def test_a_refused_write_that_is_far_too_long_breaks_the_protocol() -> None:
    parser = parser_of()
    with pytest.raises(wire.ProtocolError, match="refused request"):
        feed(parser, wire.serialize_request(Command.WRITE, 0, 1, 0, MAX_SKIPPED_BYTES + 1))
    assert parser.state is State.CLOSED


def test_a_wrong_magic_breaks_the_protocol_after_what_came_before() -> None:
    parser = parser_of()
    parser.buffer()[:56] = wire.serialize_request(Command.FLUSH, 0, 1, 0, 0) + bytes(28)
    parser.received(56)
    assert parser.next_request() == Request(Command.FLUSH, 0, 1, 0, 0)
    with pytest.raises(wire.ProtocolError, match="magic"):
        parser.next_request()
    assert parser.next_request() is None


def test_disconnect_is_the_last_request() -> None:
    parser = parser_of()
    stream = wire.serialize_request(Command.DISC, 0, 1, 0, 0) + wire.serialize_request(Command.READ, 0, 2, 0, 1)
    assert [request.command for request in feed(parser, stream)] == [Command.DISC]
    assert parser.state is State.CLOSED


def test_the_memory_that_a_request_will_take_is_known_before() -> None:
    parser = parser_of()
    cases = [(Command.READ, 4096, 4096), (Command.TRIM, 1 << 30, 0), (Command.READ, MAX_REQUEST_BYTES + 1, 0)]
    for command, length, expected in cases:
        header = wire.serialize_request(command, 0, 0, 0, length)
        parser.buffer()[:27] = header[:27]
        parser.received(27)
        assert parser.peek() is None
        parser.buffer()[:1] = header[27:]
        parser.received(1)
        request = parser.peek()
        assert request is not None
        assert memory_bytes(request, Terms()) == expected
        assert parser.next_request() is not None
    feed(parser, serialize(write_of(b"x" * 2000))[:1000])
    assert parser.peek() is None, "it is made already"


@pytest.mark.parametrize(
    ("flags", "length", "descriptors"),
    [
        (0, 4096, 2 * 3),
        (0, 1 << 40, 2 * 4096),
        (CommandFlag.REQ_ONE, 1 << 40, 2),
        (CommandFlag.PAYLOAD_LEN, 8 + 4, 4096),
        (CommandFlag.PAYLOAD_LEN, 1 << 40, 2 * 4096),
        (CommandFlag.PAYLOAD_LEN, 0, 0),
    ],
)
def test_what_blocks_are_takes_memory_for_each_context(flags: int, length: int, descriptors: int) -> None:
    terms = Terms(Style.EXTENDED, (Context(1, "base:allocation"), Context(2, "cairn:hydrated")))
    assert memory_bytes(Request(Command.BLOCK_STATUS, flags, 0, 0, length), terms) == 128 * descriptors


def test_every_step_that_the_table_lacks_raises() -> None:
    for state, step in itertools.product(State, Step):
        parser = parser_of()
        parser.state = state
        if step in TRANSITIONS[state]:
            parser._move(step)
            assert parser.state is TRANSITIONS[state][step]
        else:
            with pytest.raises(KeyError):
                parser._move(step)


# What may run.

READ, WRITE, FLUSH, TRIM, ZEROES = (
    Command.READ,
    Command.WRITE,
    Command.FLUSH,
    Command.TRIM,
    Command.WRITE_ZEROES,
)
FUA, NO_HOLE = CommandFlag.FUA, CommandFlag.NO_HOLE


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "error"),
    [
        (READ, 0, 0, 1, 0),
        (READ, FUA, SIZE - 1, 1, 0),
        (READ, 0, SIZE, 1, WireError.EINVAL),
        (READ, 0, (1 << 64) - 1, 1, WireError.EINVAL),
        (READ, NO_HOLE, 0, 1, WireError.EINVAL),
        (READ, 4, 0, 1, WireError.EINVAL),
        (READ, 0, 0, MAX_REQUEST_BYTES, 0),
        (READ, 0, 0, MAX_REQUEST_BYTES + 1, WireError.EINVAL),
        (WRITE, FUA, 0, MAX_REQUEST_BYTES, 0),
        (WRITE, 0, 0, MAX_REQUEST_BYTES + 1, WireError.EINVAL),
        (WRITE, 0, SIZE - 1, 2, WireError.ENOSPC),
        (WRITE, NO_HOLE, 0, 1, WireError.EINVAL),
        (FLUSH, 0, 0, 0, 0),
        (FLUSH, FUA, 0, 0, 0),
        (FLUSH, 0, 1, 0, WireError.EINVAL),
        (FLUSH, 0, 0, 1, WireError.EINVAL),
        (TRIM, FUA, 0, SIZE, 0),
        (TRIM, 0, 1, SIZE, WireError.EINVAL),
        (TRIM, NO_HOLE, 0, 1, WireError.EINVAL),
        (ZEROES, FUA | NO_HOLE, 0, SIZE, 0),
        (ZEROES, 0, 1, SIZE, WireError.ENOSPC),
        (ZEROES, 1 << 5, 0, 1, WireError.EINVAL),
        (7, 0, 0, 1, WireError.EINVAL),
        (65535, 0, 0, 0, WireError.EINVAL),
    ],
)
def test_refusal(command: int, flags: int, offset: int, length: int, error: int) -> None:
    refused = refusal(Request(command, flags, 0, offset, length), SIZE, read_only=False, terms=Terms())
    assert (refused.error if refused is not None else 0) == error


@pytest.mark.parametrize("command", RULES[Style.SIMPLE])
def test_a_read_only_export_refuses_all_that_changes(command: int) -> None:
    refused = refusal(Request(command, 0, 0, 0, 0), SIZE, read_only=True, terms=Terms())
    expected = WireError.NONE if command in (READ, FLUSH, Command.CACHE) else WireError.EPERM
    assert (refused.error if refused is not None else WireError.NONE) == expected


# What the client is told.


@pytest.mark.parametrize(
    ("error", "on_write", "on_read"),
    [
        (errors.InvalidRequest("x"), errno.EINVAL, errno.EINVAL),
        (errors.OutOfRange("x"), errno.ENOSPC, errno.EINVAL),
        (errors.ReadOnly("x"), errno.EPERM, errno.EPERM),
        (errors.NoSpace("x"), errno.ENOSPC, errno.ENOSPC),
        (errors.Fenced("x"), errno.ESHUTDOWN, errno.ESHUTDOWN),
        (errors.QuorumUnavailable("x"), errno.EIO, errno.EIO),
        (errors.Corrupt("x"), errno.EIO, errno.EIO),
        (errors.NotFound("x"), errno.EIO, errno.EIO),
        (errors.CairnError("x"), errno.EIO, errno.EIO),
        (RuntimeError("x"), errno.EIO, errno.EIO),
        (OSError(errno.ENOENT, "x"), errno.EIO, errno.EIO),
    ],
)
def test_errors_of_the_wire(error: BaseException, on_write: int, on_read: int) -> None:
    assert wire_error(WRITE, error) == wire_error(ZEROES, error) == on_write
    assert wire_error(READ, error) == wire_error(FLUSH, error) == on_read
