"""Streams of messages over TCP: each message behind its length, and nothing else.

The hot path goes here, and everything else by gRPC, whose streams cost some ten times as much for a small message. A
stream begins with the client's greeting, a message that says what the stream is for; who takes it answers with the
same, so that a proxy, or another server at this address, is told from the one that is meant. The side that refuses says
why in a last message (the top bit of its length is set): the number of a gRPC status, and words.

Invariants: a length is checked before memory is taken for it; messages are handed over whole, in order, and none while
an earlier one is waited for; the end is told once, whoever caused it.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final, cast

import grpc
import structlog

from blockstore.config import join_address
from blockstore.errors import CairnError, Conflict, InvalidRequest, QuorumUnavailable
from blockstore.grpc_errors import from_status, status_of
from blockstore.units import KIB, MIB

_log = structlog.get_logger(__name__)

#: No message comes near it: a batch of records has at most 1 MiB of payload, a message of results 2 MiB.
MAX_MESSAGE_BYTES: Final = 4 * MIB
_LENGTH: Final = struct.Struct("<I")
_STATUS: Final = struct.Struct("<I")
_REFUSAL: Final = 1 << 31
#: One receive takes many small messages; larger ones than fit are received where they stay.
_BUFFER_BYTES: Final = 128 * KIB
#: Sent and not taken by the network yet: beyond it `writable` is False.
_HIGH_WATER_BYTES: Final = MIB
#: A peer whose machine is gone: data is given up after this, and an idle connection is probed.
_UNANSWERED_MS: Final = 5_000
_PROBES: Final = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

Message = bytes | bytearray
"""The receiver's own: nothing else refers to it."""
OnMessage = Callable[[Message], Awaitable[None] | None]
"""Takes one message. What it returns is waited for before the next one, and nothing is received meanwhile."""
OnEnd = Callable[[CairnError], None]


class MessageStream(asyncio.BufferedProtocol):
    """One end of a stream.

    on_message: for each message; a CairnError that it raises is told to the other side, and ends the stream.
    on_end: told once, why.
    """

    def __init__(self, on_message: OnMessage, on_end: OnEnd) -> None:
        self.on_message = on_message
        self.on_end = on_end
        self.writable = True
        """False while more is on its way out than the network takes."""
        self.on_writable: Callable[[], None] = _nothing
        self._transport: asyncio.Transport | None = None
        self._ended = False
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        """What was received and not handed over, in the buffer."""
        self._large: bytearray | None = None
        self._large_is_refusal = False
        self._large_filled = 0
        self._waiting: asyncio.Future[None] | None = None

    # ---- sending

    def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """One message, in parts; they are not copied and must not change. Nothing where the stream has ended."""
        if self._transport is not None and not self._ended:
            self._transport.writelines((_LENGTH.pack(sum(map(len, parts))), *parts))

    def refuse(self, error: CairnError) -> None:
        """End the stream; `on_end` gets this error on both sides."""
        if self._transport is not None and not self._ended:
            body = _STATUS.pack(status_of(error).value[0]) + str(error).encode()
            self._transport.writelines((_LENGTH.pack(_REFUSAL | len(body)), body))
            self.close(error)

    def close(self, error: CairnError | None = None) -> None:
        """What was sent before still arrives, if there is a network. error: for this side's on_end."""
        if self._transport is not None:
            self._transport.close()
        self._finish(error or QuorumUnavailable("the stream was closed"))

    async def drained(self) -> None:
        """Until it is writable, or has ended."""
        if not self.writable and not self._ended:
            writable = asyncio.Event()
            self.on_writable = writable.set
            await writable.wait()

    # ---- what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        _probe(transport.get_extra_info("socket"))

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return memoryview(self._large)[self._large_filled :]
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is None:
            self._end += nbytes
            self._hand_over()
            return
        self._large_filled += nbytes
        if self._large_filled == len(self._large):
            message, self._large = self._large, None
            self._take(message, self._large_is_refusal)
            self._hand_over()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self._tell_writable()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(QuorumUnavailable(f"the stream has ended: {exc}" if exc else "the other side ended the stream"))

    # ---- messages out of bytes

    def _hand_over(self) -> None:
        """All messages that are whole, until one is to be waited for."""
        while self._waiting is None and not self._ended and self._end - self._start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, self._start)
            is_refusal, length = bool(length & _REFUSAL), length & ~_REFUSAL
            if length > MAX_MESSAGE_BYTES:
                self.refuse(InvalidRequest(f"a message of {length} bytes, {MAX_MESSAGE_BYTES} at most"))
                return
            begin = self._start + _LENGTH.size
            if begin + length > self._end:
                self._make_room(begin, length, is_refusal)
                return
            self._start = begin + length
            self._take(bytes(self._view[begin : begin + length]), is_refusal)
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _BUFFER_BYTES and self._waiting is None:
            self._compact()

    def _make_room(self, begin: int, length: int, is_refusal: bool) -> None:
        """For the rest of a message that has begun."""
        if length > _BUFFER_BYTES // 2:
            self._large, self._large_is_refusal = bytearray(length), is_refusal
            self._large_filled = self._end - begin
            self._large[: self._large_filled] = self._view[begin : self._end]
            self._start = self._end = 0
        elif begin + length > _BUFFER_BYTES:
            self._compact()

    def _compact(self) -> None:
        """What is held moves to the beginning of the buffer."""
        held = bytes(self._view[self._start : self._end])
        self._buffer[: len(held)] = held
        self._start, self._end = 0, len(held)

    def _take(self, message: Message, is_refusal: bool) -> None:
        if is_refusal:
            self.close(_refusal_in(message))
            return
        try:
            wait = self.on_message(message)
        except CairnError as error:
            self.refuse(error)
        except Exception as error:
            _log.error("a message failed in a way that nobody foresaw", exc_info=error)
            self.refuse(CairnError(f"a message failed inside the receiver: {type(error).__name__}: {error}"))
        else:
            if wait is not None:
                self._wait(wait)

    def _wait(self, wait: Awaitable[None]) -> None:
        assert self._transport is not None
        self._transport.pause_reading()
        self._waiting = asyncio.ensure_future(wait)
        self._waiting.add_done_callback(self._go_on)

    def _go_on(self, waited: asyncio.Future[None]) -> None:
        self._waiting = None
        if self._ended or waited.cancelled():
            return
        if (error := waited.exception()) is not None:
            if not isinstance(error, CairnError):
                _log.error("a message failed in a way that nobody foresaw", exc_info=error)
                error = CairnError(f"a message failed inside the receiver: {type(error).__name__}: {error}")
            self.refuse(error)
            return
        self._hand_over()
        if self._waiting is None and not self._ended and self._transport is not None:
            self._transport.resume_reading()

    def _finish(self, error: CairnError) -> None:
        if self._ended:
            return
        self._ended = True
        if self._waiting is not None:
            self._waiting.cancel()
        self._tell_writable()
        on_end, self.on_end, self.on_message = self.on_end, _nobody, _nothing_more
        on_end(error)

    def _tell_writable(self) -> None:
        on_writable, self.on_writable = self.on_writable, _nothing
        on_writable()


async def connect(host: str, port: int, greeting: bytes, on_message: OnMessage, on_end: OnEnd) -> MessageStream:
    """A stream to who listens there, once the greeting was taken; on_end: told of what happens after that.

    Raises QuorumUnavailable where nobody listens, InvalidRequest where somebody else does, and what refused it.
    """
    loop = asyncio.get_running_loop()
    taken: asyncio.Future[None] = loop.create_future()

    def answered(message: Message) -> None:
        if message != greeting:
            raise InvalidRequest(f"who listens at {join_address(host, port)} answered a greeting with something else")
        stream.on_message = on_message
        taken.set_result(None)

    def ended(error: CairnError) -> None:
        if taken.done():
            on_end(error)
        else:
            taken.set_exception(error)

    try:
        _, stream = await loop.create_connection(lambda: MessageStream(answered, ended), host, port)
    except OSError as error:
        raise QuorumUnavailable(f"no streams at {join_address(host, port)}: {error}") from error
    try:
        stream.send(greeting)
        await taken
    except BaseException:
        stream.close()
        raise
    return stream


Accept = Callable[[MessageStream, bytes], OnMessage]
"""Takes a new stream and its greeting; returns who gets its messages. Raises CairnError to refuse it."""


class MessageServer:
    """Listens for streams. port: where, once started."""

    def __init__(self, accept: Accept) -> None:
        self.port = 0
        self._accept = accept
        self._open: set[MessageStream] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """port: 0 takes a free one. Raises Conflict where the address cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(self._new_stream, host, port)
        except OSError as error:
            raise Conflict(
                f"cannot listen on {join_address(host, port)}: {error}; choose another port, or 0 for a free one"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def open_count(self) -> int:
        """Streams that are open, or not greeted yet."""
        return len(self._open)

    def stop(self) -> None:
        """End all streams."""
        if self._server is not None:
            self._server.close()
        for stream in [*self._open]:
            stream.close()

    def _new_stream(self) -> MessageStream:
        def greeted(greeting: Message) -> None:
            stream.on_message = self._accept(stream, bytes(greeting))
            stream.send(greeting)

        stream = MessageStream(greeted, lambda _: self._open.discard(stream))
        self._open.add(stream)
        return stream


def _refusal_in(message: Message) -> CairnError:
    if len(message) < _STATUS.size:
        return InvalidRequest("the other side refused without a reason")
    (number,) = _STATUS.unpack_from(message)
    text = bytes(message[_STATUS.size :]).decode(errors="replace")
    return from_status(_CODES.get(number, grpc.StatusCode.INTERNAL), text)


def _probe(connection: socket.socket | None) -> None:
    """Have the kernel end the connection where the other machine is gone."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNANSWERED_MS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _PROBES:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _nothing() -> None:
    """Nobody waits."""


def _nobody(_: CairnError) -> None:
    """The end was told."""


def _nothing_more(_: Message) -> None:
    """What comes after the end."""
