"""One client's connection: a thin loop around the handshake and the request parser.

Receive, step, start, reply. The state stands in `Phase`. Requests run side by side and are answered
in the order in which they end; replies that end in one turn of the event loop go out as one write.

Invariants: no request is begun while the client has its limits in flight, leaves its replies unread,
or finds no memory in the budget; its socket is not read meanwhile, so that nothing queues here
without bound. What is in flight ends even where its client is gone, and is counted until then. Each
connection has its own buffers and counters: a hostile client harms itself.
"""

import asyncio
from functools import partial
from time import perf_counter
from typing import Any, Final, Protocol, cast

import structlog

from blockstore.errors import CairnError, Fenced
from blockstore.units import KIB
from nbd_server import commands, handshake_states, transmission
from nbd_server.budget import Budget, Share
from nbd_server.command_counts import CommandCounts, CommandDurations
from nbd_server.exports import ClientExports, Export, Exports
from nbd_server.handshake import Handshake
from nbd_server.links import LinkSet
from nbd_server.phases import PHASES, Phase
from nbd_server.replies import Parts, Replies, replies_of
from nbd_server.request_parser import RequestParser
from nbd_server.security import Port
from nbd_server.terms import Terms
from nbd_server.tls import start_tls
from nbd_server.transmission import Refusal, Request
from nbd_server.volume import Buffer
from nbd_server.wire import Command, ProtocolError, WireError

_log = structlog.get_logger(__name__)

_HANDSHAKE_BUFFER_BYTES: Final = 4 * KIB
_READ: Final = int(Command.READ)


_RECEIVING: Final = frozenset({Phase.TRANSMISSION, Phase.REFUSING})
_SHUTTING_DOWN: Final = Refusal(WireError.ESHUTDOWN, "the server ends: connect again, perhaps to another one")


class Owner(Protocol):
    """The server, as its connections see it. durations: of all of them."""

    durations: CommandDurations

    def opened(self, connection: "Connection") -> None:
        """A client has connected; the connection may be dropped at once."""

    def chosen(self, connection: "Connection") -> None:
        """It has an export, and has begun no request of it."""

    def given_up(self, connection: "Connection") -> None:
        """Its set of links has ended: its client sends again over another one what it sent over this one, or that."""

    def closed(self, connection: "Connection") -> None:
        """The client is gone, and nothing of it is in flight any more."""


class Connection(asyncio.BufferedProtocol):
    """One client. in_flight_requests: what it has running now."""

    def __init__(self, owner: Owner, exports: Exports, budget: Budget, port: Port) -> None:
        self.phase = Phase.HANDSHAKE
        self.export: Export | None = None
        self.client = ""
        """Whose link it is (nbd_server/links.py); empty for a plain connection."""
        self.link_set: LinkSet[Connection] = LinkSet("")
        self.address = ""
        """Where the client is; empty for one that came by a unix socket."""
        self.in_flight_requests = 0
        self._owner = owner
        self._limits = budget.limits
        self._loop = asyncio.get_running_loop()
        self.share = Share(budget, lambda: self._loop.call_soon(self._serve))
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the client is gone and nothing of it is in flight."""
        self._transport: asyncio.Transport
        self._exports = ClientExports(exports)
        self._port = port
        self._handshake = Handshake(self._exports, port.session())
        self._early = bytearray()
        """What came under TLS before its transport was here."""
        self._upgrading: asyncio.Task[None] | None = None
        self._under_tls = False
        self._read_only = False
        self._buffer = memoryview(bytearray(_HANDSHAKE_BUFFER_BYTES))
        self._parser: RequestParser
        self._terms: Terms
        self._counts: CommandCounts
        self._durations = owner.durations.by_command
        self._answers: Replies
        self._deadline: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._looking_up: asyncio.Future[None] | None = None
        self._reading = True
        self._client_reads = True
        self._lost = False
        self._replies: list[Buffer] = []
        """Of requests that ended in this turn of the loop."""
        self._ended_bytes = 0
        """What those hold."""
        self._unread_bytes = 0
        """What the replies hold that the client leaves in the socket's queue."""
        self._pause: object = None
        """Another one each time that the client leaves its replies unread."""
        self._stall: object = None
        """What made the server hold memory for the client when it was looked at last."""

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._limits.unsent_bytes)
        self._set_deadline(self._limits.handshake_s)
        self._transport.write(self._handshake.data_to_send())
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._owner.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.buffer() if self.phase in _RECEIVING else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self.phase in _RECEIVING:
            self._parser.received(nbytes)
            self._serve()
        elif self.phase is Phase.HANDSHAKE:
            self._negotiate(self._buffer[:nbytes])
        elif self.phase is Phase.STARTING_TLS:
            self._early += self._buffer[:nbytes]

    def eof_received(self) -> bool:
        """Without DISC, but no less final: what is in flight is still answered, but for TLS, which ends both ways."""
        self.drain()
        return not self._under_tls

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lost:
            return  # whoever upgraded it has told of this before
        self._move(Phase.CLOSED)
        self._lost = True
        if self._looking_up is not None:
            self._looking_up.cancel()
        self._replies.clear()
        self.share.give_back(self._ended_bytes + self._unread_bytes)
        self._ended_bytes = self._unread_bytes = 0
        self.share.leave_line()
        self._set_deadline(None)
        if self._farewell is not None:
            self._farewell.cancel()
        self._end_if_idle()

    def pause_writing(self) -> None:
        self._client_reads = False
        self._pause = object()
        self.share.leave_line()
        self._pause_reading()

    def resume_writing(self) -> None:
        self._client_reads = True
        self.share.give_back(self._unread_bytes)
        self._unread_bytes = 0
        self._loop.call_soon(self._go_on)  # asyncio's transport does not expect to be closed from in here

    def _go_on(self) -> None:
        if self.phase is Phase.HANDSHAKE:
            self._negotiate(b"")
        else:
            self._serve()

    # What the server calls.

    def drain(self) -> None:
        """Begin no more requests; close once those in flight are answered, or `drain_s` is over."""
        if self.phase in (Phase.DRAINING, Phase.CLOSED):
            return
        if self.phase is Phase.STARTING_TLS:
            self.abort()
            return
        if self.phase is not Phase.REFUSING:  # whose deadline goes on
            self._set_deadline(self._limits.drain_s)
        self._move(Phase.DRAINING)
        self.share.leave_line()
        self._pause_reading()
        self._end_if_drained()

    def shut_down(self) -> None:
        """The server ends: as `drain`, but new requests are answered, with ESHUTDOWN (NBD, "Error values").

        A link's client is told by the end alone: to a file system an error is a broken disk (nbd_server/links.py).
        """
        if self.phase is not Phase.TRANSMISSION or self.client:
            self.drain()
            return
        self._move(Phase.REFUSING)
        self._set_deadline(self._limits.drain_s)
        self._end_if_refused()
        self._serve()

    def _end_if_refused(self) -> None:
        """A moment after all that was in flight is answered."""
        if self.phase is Phase.REFUSING and not self.in_flight_requests and self._farewell is None:
            self._farewell = self._loop.call_later(self._limits.farewell_s, self.drain)

    def drain_if_forbidden(self) -> None:
        """End it where the rules do not allow any more what its client was let in for."""
        if self.phase is Phase.TRANSMISSION and not self._handshake.options.is_still_allowed():
            _log.warning("a client lost its right to an export", export=self._name)
            self.drain()

    def abort(self) -> None:
        """Drop the connection now."""
        self._move(Phase.CLOSED)
        self._transport.abort()

    def drop_if_stalled(self) -> None:
        """Drop a client that holds memory and has done nothing about it since this was called last."""
        stall = self._what_stalls() if self.phase in _RECEIVING else None
        if stall is not None and stall is self._stall:
            _log.info("client stalled", export=self._name, held_bytes=self.in_flight_bytes)
            self.abort()
        self._stall = stall

    @property
    def in_flight_bytes(self) -> int:
        """What it holds: payloads of writes, from their first byte on, and results until they are fetched."""
        return self.share.held_bytes

    # Handshake.

    def _negotiate(self, data: memoryview | bytes) -> None:
        """Take `data`, answer as far as the client reads, and read on where it does."""
        self._handshake.receive_data(data)
        while self._client_reads and (answer := self._handshake.data_to_send()):
            self._transport.write(answer)
        if not self._client_reads:
            return
        if self._handshake.state is handshake_states.State.TRANSMISSION:
            self._begin_transmission()
        elif self._handshake.state is handshake_states.State.CLOSED:
            self.drain()
        elif self._handshake.state is handshake_states.State.LOOKING_UP:
            self._look_up()
        elif self._handshake.state is handshake_states.State.STARTING_TLS:
            self._start_tls()
        else:
            self._resume_reading()

    def _look_up(self) -> None:
        """Have the export looked up that the client named; what it sends waits in its socket meanwhile."""
        waiting = self._handshake.options.looking_up
        self._pause_reading()
        if self._looking_up is None:
            assert waiting is not None
            self._looking_up = asyncio.ensure_future(waiting)
            self._looking_up.add_done_callback(self._looked_up)

    def _looked_up(self, done: asyncio.Future[None]) -> None:
        self._looking_up = None
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.warning("an export could not be looked up", error=str(error))
        if self.phase is Phase.HANDSHAKE:
            self._handshake.looked_up()
            self._negotiate(b"")

    # TLS.

    def _start_tls(self) -> None:
        """Once the client has been told so; the deadline of the handshake goes on."""
        self._move(Phase.STARTING_TLS)
        self._pause_reading()  # nothing more is read in plain
        self._upgrading = self._loop.create_task(self._upgrade())

    async def _upgrade(self) -> None:
        context = self._port.context
        assert context is not None, "a session that may start TLS has a context"
        established = None
        if not self._transport.is_closing():
            established = await start_tls(self._transport, self, context, self._limits)
        if established is None or self.phase is not Phase.STARTING_TLS:
            self._transport.abort()
            self.connection_lost(None)  # the event loop says so only where TLS was established
            return
        self._transport, peer = established
        self._under_tls = self._reading = True
        self._transport.set_write_buffer_limits(high=self._limits.unsent_bytes)
        self._handshake.tls_started(self._port.session(peer))
        self._move(Phase.HANDSHAKE)
        early, self._early = bytes(self._early), bytearray()
        self._negotiate(early)

    def _begin_transmission(self) -> None:
        options = self._handshake.options
        export = options.chosen
        assert export is not None
        if self._exports.find(export.name) is not export or not options.is_still_allowed():
            self.abort()  # it was taken out, or the rules changed, while the client left the answer unread
            return
        self.export, self.client, self.link_set = export, options.client, LinkSet(options.link_set)
        self.share.most_bytes = self._limits.link_bytes if options.link_set else self._limits.in_flight_bytes
        self._counts = export.device.counts
        self._read_only = export.read_only or options.read_only
        self._owner.chosen(self)
        self._move(Phase.TRANSMISSION)
        self._set_deadline(None)
        self._terms = self._handshake.options.terms
        self._answers = replies_of(self._terms.style)
        self._parser = RequestParser(self._admit, self._terms.style)
        early = self._handshake.leftover
        self._parser.buffer()[: len(early)] = early
        self._parser.received(len(early))
        self._serve()

    # Transmission.

    def _serve(self) -> None:
        """Begin what was received, as far as there is room and a turn; read on only when all of it is begun."""
        turns = self.share.client.turns
        try:
            while turns.left and self._has_room():
                request = self._parser.next_request()
                if request is None:
                    self._resume_reading()
                    return
                turns.left -= 1
                self._begin(request)
        except ProtocolError as error:
            _log.info("client broke the protocol", export=self._name, error=str(error))
            self.abort()
            return
        if not turns.left:
            turns.wait(self._serve, self._loop.call_soon)
        self._pause_reading()

    def _has_room(self) -> bool:
        """Whether the next request may be begun, or its payload received."""
        if (
            self.phase not in _RECEIVING
            or not self._client_reads
            or self.in_flight_requests >= self._limits.in_flight_requests
        ):
            return False
        if self.share.is_ample():
            return True
        request = self._parser.peek()
        return self.share.may_take(0 if request is None else commands.memory_bytes(request, self._terms))

    def _admit(self, request: Request) -> Refusal | None:
        """What the parser asks of each request: why it is refused, or None, and then its memory is counted."""
        assert self.export is not None
        if self.phase is Phase.REFUSING and request.command != Command.DISC:
            return _SHUTTING_DOWN
        refused = transmission.refusal(request, self.export.size_bytes, self._read_only, self._terms)
        if refused is None and (held_bytes := commands.memory_bytes(request, self._terms)):
            self.share.take(held_bytes)
        return refused

    def _begin(self, request: Request) -> None:
        if request.command != Command.DISC and not self.link_set.may_begin(self, request.cookie):
            self._owner.given_up(self)
            return
        if request.refusal is not None:
            self._reply_error(request, request.refusal)
            return
        if request.command == Command.DISC:
            self.drain()
            return
        assert self.export is not None
        self.in_flight_requests += 1
        began = perf_counter()
        try:
            started = commands.start(request, self.export.device, self._terms)
        except Exception as error:
            self._finish(request, began, error)
            return
        if isinstance(started, Refusal):
            self.in_flight_requests -= 1
            self._ended_bytes += commands.memory_bytes(request, self._terms)
            self._reply_error(request, started)
        elif started.done():
            self._ended(request, began, started)  # without a turn of the loop
        else:
            started.add_done_callback(partial(self._ended, request, began))

    def _ended(self, request: Request, began: float, future: asyncio.Future[Any]) -> None:
        export = self.export
        if export is not None and (hold := export.device.hold) is not None and transmission.changes(request):
            hold.keep(partial(self._ended, request, began, future))
            return
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        self._finish(request, began, error, future.result() if error is None else None)

    def _finish(self, request: Request, began: float, error: BaseException | None, result: Any = None) -> None:
        """Reply, if there is still a client. began: when it was, by perf_counter."""
        self.in_flight_requests -= 1
        self._count(request, perf_counter() - began)
        held_bytes = commands.memory_bytes(request, self._terms)
        if error is not None and not isinstance(error, CairnError):
            _log.error("request failed unexpectedly", export=self._name, request=_describe(request), exc_info=error)
        if self._lost:
            self.share.give_back(held_bytes)
            self._end_if_idle()
            return
        self._ended_bytes += held_bytes
        if self.client and isinstance(error, Fenced):
            self.abort()
        elif error is not None:
            self._reply_error(request, transmission.failure(request.command, error))
        elif request.command == _READ:
            assert len(result) == request.length
            self._reply(self._answers.data(request, result))
        elif request.command == Command.BLOCK_STATUS:
            self._reply(self._answers.status(request, result))
        else:
            self._reply(self._answers.done(request))

    def _count(self, request: Request, seconds: float) -> None:
        command, counts = request.command, self._counts
        counts.ended[command] += 1
        counts.size_bytes[command] += request.length
        counts.seconds[command] += seconds
        self._durations[command].add(seconds)

    def _reply_error(self, request: Request, refusal: Refusal) -> None:
        self._counts.note_error(request.command, refusal.error)
        self._reply(self._answers.failed(request, refusal))

    def _reply(self, parts: Parts) -> None:
        if not self._replies:
            self._loop.call_soon(self._send_replies)
        self._replies += parts

    def _send_replies(self) -> None:
        """Send what has ended since the last turn; there may be room for more requests now."""
        replies, self._replies = self._replies, []
        ended_bytes, self._ended_bytes = self._ended_bytes, 0
        if self.phase is not Phase.CLOSED:
            self._transport.writelines(replies)
        if self._client_reads:
            self.share.give_back(ended_bytes)
        else:
            self._unread_bytes += ended_bytes
        self._end_if_refused()
        if self.phase is Phase.DRAINING:
            self._end_if_drained()
        elif not self._reading:
            self._serve()

    # Ends and flow.

    def _end_if_drained(self) -> None:
        if not self.in_flight_requests and not self._replies:
            self._transport.close()  # sends what is queued first

    def _end_if_idle(self) -> None:
        """The client is gone: what it holds is let go of with its last request."""
        if not self.in_flight_requests:
            self.share.give_back(self.share.held_bytes)
            self._exports.close()
            self._owner.closed(self)

    def _what_stalls(self) -> object:
        """What of the client's makes the server hold memory for it: its pause, or a payload half received."""
        if not self._client_reads:
            return self._pause
        return self._parser.receiving if self._reading else None

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
