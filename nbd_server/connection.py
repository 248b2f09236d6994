"""One client's connection: a thin loop around the handshake and the request parser.

Receive, step, start, reply. The state stands in `Phase`. Requests run side by side and are answered
in the order in which they end; replies that end in one turn of the event loop go out as one write.

Invariants: no request is begun while the client has `Limits` in flight or leaves its replies unread;
its socket is not read meanwhile, so that nothing queues here without bound. What is in flight ends
even where its client is gone, and is counted until then. Each connection has its own buffers and
counters: a hostile client harms itself.
"""

import asyncio
from collections.abc import Mapping
from enum import Enum, auto
from functools import partial
from typing import Any, Final, Protocol, cast

import structlog

from blockstore.errors import CairnError
from blockstore.units import KIB
from nbd_server import handshake, transmission, wire
from nbd_server.exports import Export, Exports
from nbd_server.handshake import Handshake
from nbd_server.limits import Limits
from nbd_server.transmission import Request, RequestParser
from nbd_server.volume import Buffer
from nbd_server.wire import Command, CommandFlag, ProtocolError

_log = structlog.get_logger(__name__)

_HANDSHAKE_BUFFER_BYTES: Final = 4 * KIB
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)


class Phase(Enum):
    """Where a connection is."""

    HANDSHAKE = auto()
    TRANSMISSION = auto()
    DRAINING = auto()
    """Takes no more requests; ends when those in flight are answered."""
    CLOSED = auto()


PHASES: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.HANDSHAKE: frozenset({Phase.TRANSMISSION, Phase.DRAINING, Phase.CLOSED}),
    Phase.TRANSMISSION: frozenset({Phase.DRAINING, Phase.CLOSED}),
    Phase.DRAINING: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


class Owner(Protocol):
    """The server, as its connections see it."""

    def opened(self, connection: "Connection") -> None:
        """A client has connected; the connection may be dropped at once."""

    def closed(self, connection: "Connection") -> None:
        """The client is gone, and nothing of it is in flight any more."""


class Connection(asyncio.BufferedProtocol):
    """One client. in_flight_requests, in_flight_bytes: what it has running now."""

    def __init__(self, owner: Owner, exports: Exports, limits: Limits) -> None:
        self.phase = Phase.HANDSHAKE
        self.export: Export | None = None
        self.in_flight_requests = 0
        self.in_flight_bytes = 0
        self._owner = owner
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the client is gone and nothing of it is in flight."""
        self._transport: asyncio.Transport
        self._handshake = Handshake(exports)
        self._buffer = memoryview(bytearray(_HANDSHAKE_BUFFER_BYTES))
        self._parser: RequestParser
        self._deadline: asyncio.TimerHandle | None = None
        self._reading = True
        self._client_reads = True
        self._lost = False
        self._replies: list[Buffer] = []
        """Of requests that ended in this turn of the loop."""

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.unsent_bytes)
        self._set_deadline(self._limits.handshake_s)
        self._transport.write(self._handshake.data_to_send())
        self._owner.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.buffer() if self.phase is Phase.TRANSMISSION else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.phase is Phase.TRANSMISSION:
            self._parser.received(nbytes)
            self._serve()
        elif self.phase is Phase.HANDSHAKE:
            self._negotiate(self._buffer[:nbytes])

    def eof_received(self) -> bool:
        """Without DISC, but no less final: what is in flight is still answered."""
        self.drain()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._move(Phase.CLOSED)
        self._lost = True
        self._replies.clear()
        self._set_deadline(None)
        if not self.in_flight_requests:
            self._owner.closed(self)

    def pause_writing(self) -> None:
        self._client_reads = False
        self._pause_reading()

    def resume_writing(self) -> None:
        self._client_reads = True
        if self.phase is Phase.HANDSHAKE:
            self._resume_reading()
        else:
            self._serve()

    # What the server calls.

    def drain(self) -> None:
        """Begin no more requests; close once those in flight are answered, or `drain_s` is over."""
        if self.phase in (Phase.DRAINING, Phase.CLOSED):
            return
        self._move(Phase.DRAINING)
        self._pause_reading()
        self._set_deadline(self._limits.drain_s)
        self._end_if_drained()

    def abort(self) -> None:
        """Drop the connection now."""
        self._move(Phase.CLOSED)
        self._transport.abort()

    # Handshake.

    def _negotiate(self, data: memoryview) -> None:
        self._handshake.receive_data(data)
        self._transport.write(self._handshake.data_to_send())
        if self._handshake.state is handshake.State.TRANSMISSION:
            self._begin_transmission()
        elif self._handshake.state is handshake.State.CLOSED:
            self.drain()

    def _begin_transmission(self) -> None:
        export = self._handshake.chosen
        assert export is not None
        self.export = export
        self._move(Phase.TRANSMISSION)
        self._set_deadline(None)
        device, read_only = export.device, export.read_only
        self._parser = RequestParser(lambda request: transmission.refusal(request, device.size_bytes, read_only))
        early = self._handshake.leftover
        self._parser.buffer()[: len(early)] = early
        self._parser.received(len(early))
        self._serve()

    # Transmission.

    def _serve(self) -> None:
        """Begin what was received, as far as there is room; read on only when all of it is begun."""
        try:
            while self._has_room():
                request = self._parser.next_request()
                if request is None:
                    self._resume_reading()
                    return
                self._begin(request)
        except ProtocolError as error:
            _log.info("client broke the protocol", export=self._name, error=str(error))
            self.abort()
            return
        self._pause_reading()

    def _has_room(self) -> bool:
        return (
            self.phase is Phase.TRANSMISSION
            and self._client_reads
            and self.in_flight_requests < self._limits.in_flight_requests
            and self.in_flight_bytes < self._limits.in_flight_bytes
        )

    def _begin(self, request: Request) -> None:
        if request.error:
            self._reply(wire.serialize_simple_reply(request.cookie, request.error))
            return
        if request.command == Command.DISC:
            self.drain()
            return
        try:
            future = self._start(request)
        except CairnError as error:
            self._reply_error(request, error)
            return
        self.in_flight_requests += 1
        if request.command <= _WRITE:
            self.in_flight_bytes += request.length
        future.add_done_callback(partial(self._ended, request))

    def _start(self, request: Request) -> asyncio.Future[Any]:
        assert self.export is not None
        device = self.export.device
        if request.command == _READ:
            return device.read(request.offset, request.length)
        if request.command == _WRITE:
            return device.write(request.offset, request.payload or b"")
        if request.command == Command.FLUSH:
            return device.flush()
        if request.command == Command.TRIM:
            return device.trim(request.offset, request.length)
        assert request.command == Command.WRITE_ZEROES
        allocate = bool(request.flags & CommandFlag.NO_HOLE)
        return device.zero(request.offset, request.length, allocate=allocate)

    def _ended(self, request: Request, future: asyncio.Future[Any]) -> None:
        self.in_flight_requests -= 1
        if request.command <= _WRITE:
            self.in_flight_bytes -= request.length
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        if self._lost:
            if not self.in_flight_requests:
                self._owner.closed(self)
        elif error is not None:
            self._reply_error(request, error)
        elif request.command == _READ:
            data = future.result()
            assert len(data) == request.length
            self._reply(wire.serialize_simple_reply(request.cookie), data)
        else:
            self._reply(wire.serialize_simple_reply(request.cookie))

    def _reply_error(self, request: Request, error: BaseException) -> None:
        if not isinstance(error, CairnError):
            _log.error("request failed unexpectedly", export=self._name, request=_describe(request), exc_info=error)
        self._reply(wire.serialize_simple_reply(request.cookie, transmission.wire_error(request.command, error)))

    def _reply(self, *parts: Buffer) -> None:
        if not self._replies:
            self._loop.call_soon(self._send_replies)
        self._replies += parts

    def _send_replies(self) -> None:
        """Send what has ended since the last turn; there may be room for more requests now."""
        replies, self._replies = self._replies, []
        if self.phase is Phase.CLOSED:
            return
        self._transport.writelines(replies)
        if self.phase is Phase.DRAINING:
            self._end_if_drained()
        elif not self._reading:
            self._serve()

    # Ends and flow.

    def _end_if_drained(self) -> None:
        if not self.in_flight_requests and not self._replies:
            self._transport.close()  # sends what is queued first

    def _move(self, phase: Phase) -> None:
        if phase is not self.phase:
            assert phase in PHASES[self.phase], f"from {self.phase} to {phase}"
            self.phase = phase

    def _set_deadline(self, delay_s: float | None) -> None:
        """Drop the connection after `delay_s`, in place of any deadline before; None: not at all."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if delay_s is None else self._loop.call_later(delay_s, self.abort)

    def _pause_reading(self) -> None:
        if self._reading and not self._transport.is_closing():
            self._reading = False
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._reading and not self._transport.is_closing():
            self._reading = True
            self._transport.resume_reading()

    @property
    def _name(self) -> str | None:
        return None if self.export is None else self.export.name


def _describe(request: Request) -> str:
    return f"command {request.command}, offset {request.offset}, length {request.length}"
