"""Requests out of a client's stream of bytes, compact or extended. Pure.

`RequestParser` lends out the memory that the next bytes are to be received into, so that a large
write's payload goes from the socket to where it stays without being moved.

Invariants: memory for a payload is made only once its request was found good, and its length is at
most MAX_REQUEST_BYTES; the payload of a refused request is dropped as it arrives, so that the requests
behind it are understood; a client that cannot be understood raises ProtocolError, and stays CLOSED.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Final

from blockstore.units import KIB
from nbd_server.terms import Style
from nbd_server.transmission import MAX_REQUEST_BYTES, Refusal, Request
from nbd_server.wire import (
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ProtocolError,
)

#: A refused write is answered after its payload was dropped; one longer than this is an attack or a bug. Of an
#: extended request it is MAX_REQUEST_BYTES (NBD, "Request message").
MAX_SKIPPED_BYTES: Final = 4 * MAX_REQUEST_BYTES
#: Holds some 30 writes of 4 KiB, so that one receive takes a whole queue of them.
RECEIVE_BUFFER_BYTES: Final = 128 * KIB

_WRITE: Final = int(Command.WRITE)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)


class State(Enum):
    """Where the parser is in the client's stream."""

    HEADER = auto()
    """At, or within, a request's header."""
    PAYLOAD = auto()
    """Receives a payload into memory of its own."""
    SKIPPING = auto()
    """Drops the payload of a refused request."""
    CLOSED = auto()
    """Nothing that follows counts."""


class Step(Enum):
    """What moves the state. A request that is received at one stroke does not."""

    PAYLOAD_BEGUN = auto()
    PAYLOAD_REFUSED = auto()
    PAYLOAD_ENDED = auto()
    DISCONNECTED = auto()
    BROKEN = auto()


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.HEADER: {
        Step.PAYLOAD_BEGUN: State.PAYLOAD,
        Step.PAYLOAD_REFUSED: State.SKIPPING,
        Step.DISCONNECTED: State.CLOSED,
        Step.BROKEN: State.CLOSED,
    },
    State.PAYLOAD: {Step.PAYLOAD_ENDED: State.HEADER},
    State.SKIPPING: {Step.PAYLOAD_ENDED: State.HEADER},
    State.CLOSED: {},
}


class RequestParser:
    """Requests out of a client's stream.

    Receive into `buffer()`, say how much came with `received`, and take requests until `next_request`
    returns None; only then ask for the buffer again. What was not taken waits.
    """

    def __init__(
        self,
        refuse: Callable[[Request], Refusal | None],
        style: Style = Style.SIMPLE,
        buffer_bytes: int = RECEIVE_BUFFER_BYTES,
    ) -> None:
        """refuse: told of each request, save DISC, before memory for its payload is made; why not, or None."""
        self.state: State = State.HEADER
        self._refuse = refuse
        self._extended = style is Style.EXTENDED
        self._header = EXTENDED_REQUEST if self._extended else REQUEST
        self._header_bytes = self._header.size
        self._magic = EXTENDED_REQUEST_MAGIC if self._extended else REQUEST_MAGIC
        self._longest_skipped = MAX_REQUEST_BYTES if self._extended else MAX_SKIPPED_BYTES
        assert buffer_bytes > self._header_bytes
        self._view = memoryview(bytearray(buffer_bytes))
        self._start = 0
        self._end = 0
        self._request: Request | None = None
        """The one whose payload is being received or dropped."""
        self._payload = memoryview(b"")
        self._missing_bytes = 0
        """Of that payload."""

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Valid until the next call of any method."""
        if self.state is State.PAYLOAD:
            return self._payload[-self._missing_bytes :]
        kept = self._end - self._start
        assert kept < self._header_bytes, "requests are left to be taken"
        if self._start:
            self._view[:kept] = self._view[self._start : self._end]
            self._start, self._end = 0, kept
        return self._view[kept:]

    def received(self, count: int) -> None:
        """The first `count` bytes of `buffer()` have come."""
        if self.state is State.PAYLOAD:
            self._missing_bytes -= count
            assert self._missing_bytes >= 0
        else:
            self._end += count
            assert self._end <= len(self._view)

    @property
    def receiving(self) -> Request | None:
        """The request whose payload has begun to come; its memory is made already."""
        return self._request if self.state is State.PAYLOAD else None

    def peek(self) -> Request | None:
        """The next request as its header has it, whose memory is not made yet; None where it is not there."""
        if self.state is not State.HEADER or self._end - self._start < self._header_bytes:
            return None
        _, flags, command, cookie, offset, length = self._header.unpack_from(self._view, self._start)
        return Request(command, flags, cookie, offset, length)

    def next_request(self) -> Request | None:
        """The next whole request, or None until more was received. Raises ProtocolError.

        DISC is the last; what follows it, or an error, is ignored.
        """
        if self.state is State.HEADER:
            return self._next_from_header()
        if self.state is State.SKIPPING:
            dropped = min(self._missing_bytes, self._end - self._start)
            self._start += dropped
            self._missing_bytes -= dropped
        if self.state is State.CLOSED or self._missing_bytes:
            return None
        return self._end_payload()

    def _move(self, step: Step) -> None:
        self.state = TRANSITIONS[self.state][step]

    def _next_from_header(self) -> Request | None:
        available = self._end - self._start - self._header_bytes
        if available < 0:
            return None
        magic, flags, command, cookie, offset, length = self._header.unpack_from(self._view, self._start)
        if magic != self._magic:
            self._move(Step.BROKEN)
            raise ProtocolError(f"request magic {magic:#x} instead of {self._magic:#x}")
        self._start += self._header_bytes
        request = Request(command, flags, cookie, offset, length)
        if command == Command.DISC:
            self._move(Step.DISCONNECTED)
            return request
        refused = self._refuse(request)
        # NBD, "Request message": what says that a payload follows.
        if length and (flags & _PAYLOAD_LEN if self._extended else command == _WRITE):
            return self._begin_payload(request, refused, available)
        return replace(request, refusal=refused) if refused is not None else request

    def _begin_payload(self, request: Request, refused: Refusal | None, available: int) -> Request | None:
        length = request.length
        if refused is not None:
            if length > self._longest_skipped:
                self._move(Step.BROKEN)
                raise ProtocolError(f"a refused request with a payload of {length} bytes: too long to be skipped")
            self._request, self._missing_bytes = replace(request, refusal=refused), length
            self._move(Step.PAYLOAD_REFUSED)
            return self.next_request()
        start = self._start
        if available >= length:
            self._start = start + length
            payload = self._view[start : start + length].tobytes()
            return Request(request.command, request.flags, request.cookie, request.offset, length, payload)
        memory = bytearray(length)
        memory[:available] = self._view[start : self._end]
        self._start = self._end
        self._request, self._missing_bytes = replace(request, payload=memory), length - available
        self._payload = memoryview(memory)
        self._move(Step.PAYLOAD_BEGUN)
        return None

    def _end_payload(self) -> Request:
        request = self._request
        assert request is not None
        self._request, self._payload = None, memoryview(b"")
        self._move(Step.PAYLOAD_ENDED)
        return request
