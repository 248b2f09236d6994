"""The transmission phase: requests out of bytes, and what may run. Pure.

`RequestParser` lends out the memory that the next bytes are to be received into, so that a large
write's payload goes from the socket to where it stays without being moved. `refusal` says whether a
request may run, `wire_error` what the client is told of one that failed: validating, doing and
translating are three functions.

Invariants: memory for a payload is made only once its request was found good, and its length is at
most MAX_REQUEST_BYTES; the payload of a refused write is dropped as it arrives, so that the requests
behind it are understood; a client that cannot be understood raises ProtocolError, and stays CLOSED.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, NamedTuple

from blockstore.errors import CairnError
from blockstore.units import KIB, MIB
from nbd_server.wire import (
    REQUEST,
    REQUEST_MAGIC,
    Command,
    CommandFlag,
    ProtocolError,
    WireError,
)

#: Longest READ and WRITE; NBD, "Block size constraints", lets clients assume it.
MAX_REQUEST_BYTES: Final = 32 * MIB
#: A refused write is answered after its payload was dropped; one longer than this is an attack or a bug.
MAX_SKIPPED_BYTES: Final = 4 * MAX_REQUEST_BYTES
#: Holds some 30 writes of 4 KiB, so that one receive takes a whole queue of them.
RECEIVE_BUFFER_BYTES: Final = 128 * KIB

_HEADER_BYTES: Final = REQUEST.size
_WRITE: Final = int(Command.WRITE)


class Request(NamedTuple):
    """What a client asks for.

    command, flags: maybe none that are known, and then `error` is set. offset, length: in bytes.
    payload: the data of a WRITE that is to run, its owner's alone. error: why it is refused, or NONE.
    """

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: bytes | bytearray | None = None
    error: int = WireError.NONE


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for one command (NBD, "Request types", "Command flags" and "Error values")."""

    flags: int
    changes: bool
    beyond_end: WireError
    max_bytes: int


_ANY_LENGTH: Final = (1 << 32) - 1

RULES: Final[Mapping[int, Rule]] = {
    Command.READ: Rule(CommandFlag.FUA, False, WireError.EINVAL, MAX_REQUEST_BYTES),
    Command.WRITE: Rule(CommandFlag.FUA, True, WireError.ENOSPC, MAX_REQUEST_BYTES),
    Command.FLUSH: Rule(CommandFlag.FUA, False, WireError.EINVAL, 0),
    # These carry no payload, so that the longest request does not bind them.
    Command.TRIM: Rule(CommandFlag.FUA, True, WireError.EINVAL, _ANY_LENGTH),
    Command.WRITE_ZEROES: Rule(CommandFlag.FUA | CommandFlag.NO_HOLE, True, WireError.ENOSPC, _ANY_LENGTH),
}


def changes(request: Request) -> bool:
    """Whether the request, which may run, changes what the export holds."""
    return RULES[request.command].changes


def refusal(request: Request, size_bytes: int, read_only: bool) -> int:
    """Why `request` may not run on an export of that size, as an error of the wire; NONE where it may."""
    rule = RULES.get(request.command)
    if rule is None or request.flags & ~rule.flags or request.length > rule.max_bytes:
        return WireError.EINVAL
    if request.command == Command.FLUSH and request.offset:
        return WireError.EINVAL
    if read_only and rule.changes:
        return WireError.EPERM
    if request.offset + request.length > size_bytes:
        return rule.beyond_end
    return WireError.NONE


_ON_THE_WIRE: Final = frozenset(int(error) for error in WireError)


def wire_error(command: int, error: BaseException) -> int:
    """What the client is told where `command` ended with `error`.

    The table of blockstore.errors, save for what the NBD text does not allow in a reply: EIO then.
    """
    codes = error.codes if isinstance(error, CairnError) else CairnError.codes
    code = codes.nbd_write if command in (Command.WRITE, Command.WRITE_ZEROES) else codes.nbd_other
    return code if code in _ON_THE_WIRE else WireError.EIO


class State(Enum):
    """Where the parser is in the client's stream."""

    HEADER = auto()
    """At, or within, a request's header."""
    PAYLOAD = auto()
    """Receives the payload of a write into memory of its own."""
    SKIPPING = auto()
    """Drops the payload of a refused write."""
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

    def __init__(self, refuse: Callable[[Request], int], buffer_bytes: int = RECEIVE_BUFFER_BYTES) -> None:
        """refuse: told of each request, save DISC, before memory for its payload is made; an error, or NONE."""
        assert buffer_bytes > _HEADER_BYTES
        self.state: State = State.HEADER
        self._refuse = refuse
        self._view = memoryview(bytearray(buffer_bytes))
        self._start = 0
        self._end = 0
        self._request: Request | None = None
        """The write whose payload is being received or dropped."""
        self._payload = memoryview(b"")
        self._missing_bytes = 0
        """Of that payload."""

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Valid until the next call of any method."""
        if self.state is State.PAYLOAD:
            return self._payload[-self._missing_bytes :]
        kept = self._end - self._start
        assert kept < _HEADER_BYTES, "requests are left to be taken"
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
        """The write whose payload has begun to come; its memory is made already."""
        return self._request if self.state is State.PAYLOAD else None

    def next_bytes(self) -> int:
        """The memory that the next request will take, payload or result; 0 where none, or it is not known yet."""
        if self.state is not State.HEADER or self._end - self._start < _HEADER_BYTES:
            return 0
        _, _, command, _, _, length = REQUEST.unpack_from(self._view, self._start)
        return int(length) if command <= _WRITE and length <= MAX_REQUEST_BYTES else 0

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
        available = self._end - self._start - _HEADER_BYTES
        if available < 0:
            return None
        magic, flags, command, cookie, offset, length = REQUEST.unpack_from(self._view, self._start)
        if magic != REQUEST_MAGIC:
            self._move(Step.BROKEN)
            raise ProtocolError(f"request magic {magic:#x} instead of {REQUEST_MAGIC:#x}")
        self._start += _HEADER_BYTES
        if command == Command.DISC:
            self._move(Step.DISCONNECTED)
            return Request(command, flags, cookie, offset, length)
        request = Request(command, flags, cookie, offset, length)
        error = self._refuse(request)
        if command == _WRITE and length:
            return self._begin_payload(request, error, available)
        return request._replace(error=error) if error else request

    def _begin_payload(self, request: Request, error: int, available: int) -> Request | None:
        length = request.length
        if error:
            if length > MAX_SKIPPED_BYTES:
                self._move(Step.BROKEN)
                raise ProtocolError(f"a refused write of {length} bytes: more than {MAX_SKIPPED_BYTES}")
            self._request, self._missing_bytes = request._replace(error=error), length
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
        self._request, self._missing_bytes = request._replace(payload=memory), length - available
        self._payload = memoryview(memory)
        self._move(Step.PAYLOAD_BEGUN)
        return None

    def _end_payload(self) -> Request:
        request = self._request
        assert request is not None
        self._request, self._payload = None, memoryview(b"")
        self._move(Step.PAYLOAD_ENDED)
        return request
