"""One connection to a member: it is sealed, then carries records and reads until it breaks."""

import asyncio
from collections import deque
from typing import Final, Protocol

import grpc
import structlog

from blockstore.config import split_address
from blockstore.domain import ReplicaAddress, ReplicaId, TablesPlace
from blockstore.errors import CairnError, InvalidRequest, QuorumUnavailable
from blockstore.grpc_errors import cairn_errors, from_status
from blockstore.message_stream import Message
from blockstore.replica_codec import (
    decode_place,
    decode_read_response,
    decode_seal_answer,
    encode_seal,
    from_position,
    make_target,
)
from blockstore.replication.messages import Append, AppendAnswer, FencedBy, ReadFrom, SealAnswer, SealEpoch
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.units import BLOCK_SIZE, Epoch
from blockstore.volume.block_status import StatusQuery
from blockstore.volume.directory import MemberDirectory
from blockstore.volume.member_streams import GrpcStreams, MessageStreams, Streams

_log = structlog.get_logger(__name__)

#: Blocks that one message asks for, unless a single range has more.
_MAX_BLOCKS: Final = 256
#: Messages of reads that are not answered yet: few, so that those that wait share the next one.
_READS_IN_FLIGHT: Final = 2
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

AbsentRuns = list[tuple[int, int]]
"""Blocks of a read that have no entry, as (first, count), counted from the read's first block."""


class LinkEvents(Protocol):
    """What a link tells. All are called in the event loop."""

    def connected(self, replica: ReplicaId) -> None: ...
    def disconnected(self, replica: ReplicaId) -> None: ...
    def answered(self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None: ...
    def tables_found(self, replica: ReplicaId, place: TablesPlace) -> None: ...
    def read_arrived(self, attempt: int, data: memoryview) -> None: ...
    def read_arrived_in_part(self, attempt: int, data: memoryview, absent: AbsentRuns) -> None: ...
    def read_failed(self, attempt: int, error: CairnError) -> None: ...
    def status_arrived(self, attempt: int, response: pb.BlockStatusResponse) -> None: ...


class MemberSession:
    """What is sent on one connection to a member, and what is expected back.

    call_timeout_s: of a call, and of an answer on a stream.
    """

    def __init__(
        self, address: ReplicaAddress, channel: grpc.aio.Channel, events: LinkEvents, call_timeout_s: float
    ) -> None:
        self._address = address
        self._channel = channel
        self._events = events
        self._call_timeout_s = call_timeout_s
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._seal: asyncio.Future[SealEpoch] = loop.create_future()
        self._directory: MemberDirectory | None = None
        self._streams: Streams | None = None
        self._outgoing: deque[Append] = deque()
        self._ranges: deque[ReadFrom] = deque()
        self._asked: dict[int, int] = {}
        """Blocks expected, by attempt."""
        self._unanswered: deque[tuple[int, float]] = deque()
        """Of each message of reads that was sent: the results that are missing, and when it was sent."""
        self._last_request = 0
        self._silent_since: float | None = None
        self._broken: asyncio.Future[None] = loop.create_future()
        self._asking: set[asyncio.Task[None]] = set()

    # ---- what the leader sends

    def send(self, message: SealEpoch | Append) -> None:
        if isinstance(message, SealEpoch):
            self._seal.set_result(message)
            return
        self._outgoing.append(message)
        if self._streams is not None:
            self._streams.append_waits()

    def read(self, effect: ReadFrom) -> None:
        self._ranges.append(effect)
        if self._streams is not None:
            self._streams.reads_wait()

    def ask(self, effect: ReadFrom, query: StatusQuery) -> None:
        task = self._loop.create_task(self._ask(effect, query))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, effect: ReadFrom, query: StatusQuery) -> None:
        seal = await self._seal
        target = make_target(self._address, seal.epoch, seal.configuration)
        request = query.request(target, effect.start, effect.count, effect.commit)
        try:
            with cairn_errors("a node that was asked what blocks are"):
                stub = replica_pb2_grpc.ReplicaStub(self._channel)
                response: pb.BlockStatusResponse = await stub.BlockStatus(request, timeout=self._call_timeout_s)
            query.check(response, effect.count)
        except CairnError as error:
            self._events.read_failed(effect.attempt, error)
        else:
            self._events.status_arrived(effect.attempt, response)

    def check(self) -> None:
        """Break off where the other side has not answered for call_timeout_s."""
        waits = [since for since in (self._silent_since, self._reading_since) if since is not None]
        if waits and self._loop.time() - min(waits) > self._call_timeout_s:
            self.break_off(f"it has not answered for {self._call_timeout_s} s")

    def break_off(self, why: str) -> None:
        if not self._broken.done():
            self._broken.set_exception(QuorumUnavailable(why))

    @property
    def _reading_since(self) -> float | None:
        return self._unanswered[0][1] if self._unanswered else None

    # ---- its course

    async def seal(self, directory: MemberDirectory, node: str) -> Streams:
        """Seal the member's log, and tell the answer. node: HOST:PORT, where its streams are asked for."""
        seal = await self._seal
        self._directory = directory
        known = max(seal.known, directory.known(self._address.replica))
        request = encode_seal(self._address, seal, directory.peers(), known)
        stub = replica_pb2_grpc.ReplicaStub(self._channel)
        response: pb.SealEpochResponse = await stub.SealEpoch(request, timeout=self._call_timeout_s)
        if response.HasField("tables"):
            self._events.tables_found(self._address.replica, decode_place(response.tables))
        self._events.answered(self._address.replica, decode_seal_answer(response, seal))
        return await self._open_streams(split_address(node)[0], response.streams_port)

    async def _open_streams(self, host: str, port: int) -> Streams:
        """gRPC's where the node has no others, or nobody reaches them."""
        if port:
            try:
                async with asyncio.timeout(self._call_timeout_s):
                    return await MessageStreams.to(host, port, self._address, self)
            except (CairnError, TimeoutError) as error:
                why = str(error) or f"nobody answered at port {port} within {self._call_timeout_s} s"
                _log.warning("records and reads go over gRPC", replica=self._address.replica, why=why)
        return GrpcStreams(self._channel, self._address, self)

    async def run(self, streams: Streams) -> None:
        """Carry records and reads until one of the streams ends: raises."""
        self._streams = streams
        running = self._loop.create_task(streams.run())
        try:
            await asyncio.wait((running, self._broken), return_when=asyncio.FIRST_COMPLETED)
            ended: asyncio.Future[None] = self._broken if self._broken.done() else running
            ended.result()
        finally:
            self._streams = None
            self._broken.cancel()
            running.cancel()
            asking, self._asking = self._asking, set()
            for task in asking:
                task.cancel()
            await asyncio.gather(running, *asking, return_exceptions=True)
            # A task keeps its error, that one its frames, and those the calls, which keep the connection open. Who
            # looks for circles comes by once in hours (see blockstore.cli.daemon_process), so none is left behind.
            asking.clear()
            del running, ended
            self._broken = self._loop.create_future()

    # ---- records

    def next_append(self) -> Append | None:
        """The next message of records."""
        if not self._outgoing:
            return None
        message = self._outgoing.popleft()
        self._last_request = message.request
        if self._silent_since is None:
            self._silent_since = self._loop.time()
        return message

    def peer(self, replica: ReplicaId) -> pb.Peer:
        assert self._directory is not None, "records are sent only after the seal"
        return self._directory.peer(replica)

    @property
    def epoch(self) -> Epoch:
        return self._seal.result().epoch

    def take_answer(self, answer: AppendAnswer | FencedBy) -> None:
        done = isinstance(answer, FencedBy) or answer.request >= self._last_request
        self._silent_since = None if done else self._loop.time()
        self._events.answered(self._address.replica, answer)

    # ---- reads

    def next_reads(self) -> list[bytes] | None:
        """The next message of reads, while not too many are unanswered."""
        if not self._ranges or len(self._unanswered) >= _READS_IN_FLIGHT:
            return None
        asked = self._next_ranges()
        self._asked.update((each.attempt, each.count) for each in asked)
        self._unanswered.append((len(asked), self._loop.time()))
        seal = self._seal.result()
        request = pb.ReadRequest(
            target=make_target(self._address, seal.epoch, seal.configuration),
            commit=from_position(max(each.commit for each in asked)),
            ranges=[pb.ReadRange(request=each.attempt, start=each.start, count=each.count) for each in asked],
        )
        return [request.SerializeToString()]

    def _next_ranges(self) -> list[ReadFrom]:
        """What one message asks for; there is at least one."""
        asked = [self._ranges.popleft()]
        blocks = asked[0].count
        while self._ranges and blocks + self._ranges[0].count <= _MAX_BLOCKS:
            blocks += self._ranges[0].count
            asked.append(self._ranges.popleft())
        return asked

    def take_results(self, message: Message) -> None:
        """A serialized ReadResponse. Raises InvalidRequest and Corrupt."""
        results, payload, refusal, absent = decode_read_response(message)
        at = 0
        for request, blocks, status in results:
            end = at + blocks * BLOCK_SIZE
            self._take_result(request, payload[at:end], status, refusal, absent)
            at = end

    def _take_result(
        self, request: int, data: memoryview, status: int, refusal: str, absent: dict[int, AbsentRuns]
    ) -> None:
        expected = self._asked.pop(request, None)
        if expected is None or (not status and len(data) != expected * BLOCK_SIZE):
            raise InvalidRequest(
                f"the node answered read {request} with {len(data)} bytes, asked for {expected} blocks"
            )
        self._count_answer()
        if status:
            error = from_status(_CODES.get(status, grpc.StatusCode.INTERNAL), refusal)
            self._events.read_failed(request, error)
        elif absent and request in absent:
            self._events.read_arrived_in_part(request, data, absent[request])
        else:
            self._events.read_arrived(request, data)

    def _count_answer(self) -> None:
        """The oldest message has one result less to come; results come in the order of the messages."""
        missing, sent_at = self._unanswered.popleft()
        if missing > 1:
            self._unanswered.appendleft((missing - 1, sent_at))
        elif self._streams is not None:
            self._streams.reads_wait()
