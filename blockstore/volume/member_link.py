"""The way to one member: it dials, seals, and keeps a stream for records and one for reads.

A link only carries. What is sent and what an answer means is the leader's business; a link tells it
when the way is open and when it is lost, and then tries again by itself, at the address that control
knows by then. One session is one connection: what was under way in one that broke is lost.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import grpc
import structlog

from blockstore.domain import ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, InvalidRequest, QuorumUnavailable
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors, from_status
from blockstore.replica_codec import (
    decode_append_answer,
    decode_read_response,
    decode_seal_answer,
    encode_append,
    encode_seal,
    encode_target,
    from_position,
    make_target,
)
from blockstore.replication.messages import Append, AppendAnswer, FencedBy, ReadFrom, SealAnswer, SealEpoch
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.units import BLOCK_SIZE, Epoch
from blockstore.volume.block_status import StatusQuery
from blockstore.volume.directory import MemberDirectory

_log = structlog.get_logger(__name__)
_REPLICATE: Final = "/cairn.v1.Replica/Replicate"
_READ: Final = "/cairn.v1.Replica/Read"
_FIRST_PAUSE_S: Final = 0.1
#: A node that was started again confirms nothing before it is dialled: that is looked for often.
_LONGEST_PAUSE_S: Final = 0.3
#: To connect: a node that has moved is looked up again after this.
_REACH_S: Final = 1.0
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
    def read_arrived(self, attempt: int, data: memoryview) -> None: ...
    def read_arrived_in_part(self, attempt: int, data: memoryview, absent: AbsentRuns) -> None: ...
    def read_failed(self, attempt: int, error: CairnError) -> None: ...
    def status_arrived(self, attempt: int, response: pb.BlockStatusResponse) -> None: ...


class MemberLink:
    """Carries messages between a leader and one member.

    call_timeout_s: of a unary call, and of an answer on a stream.
    """

    def __init__(
        self, address: ReplicaAddress, events: LinkEvents, directory: MemberDirectory, call_timeout_s: float
    ) -> None:
        self.address = address
        self.why = "not connected yet"
        """Why there is no connection; empty where there is one."""
        self._events = events
        self._directory = directory
        self._call_timeout_s = call_timeout_s
        self._session: _Session | None = None

    @property
    def replica(self) -> ReplicaId:
        return self.address.replica

    # ---- what the leader sends

    def send(self, message: SealEpoch | Append) -> None:
        """In order with what was sent before; lost where there is no connection."""
        if self._session is not None:
            self._session.send(message)

    def read(self, effect: ReadFrom) -> None:
        """Ask for blocks; answered by one of the events of reads, unless the connection breaks."""
        if self._session is not None:
            self._session.read(effect)

    def ask(self, effect: ReadFrom, query: StatusQuery) -> None:
        """Ask what those blocks are; answered as `read` is."""
        if self._session is not None:
            self._session.ask(effect, query)

    def reconnect(self) -> None:
        """Close the connection and open another one."""
        if self._session is not None:
            self._session.break_off("it has to be sealed again")

    def check(self) -> None:
        """Break a connection whose other side has not answered for call_timeout_s."""
        if self._session is not None:
            self._session.check()

    # ---- connection

    async def run(self) -> None:
        """Connect, again and again, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._connect()
            except CairnError as error:
                was_open = not self.why
                self._note(str(error))
                pause_s = _FIRST_PAUSE_S if was_open else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)
            await self._directory.refresh()

    async def _connect(self) -> None:
        """One session, until it breaks: it ends by raising."""
        peer = self._directory.peer(self.replica)
        if not peer.address:
            raise QuorumUnavailable("control does not know where its node is")
        channel = open_channel(peer.address)
        try:
            await self._reach(channel, peer.address)
            session = self._session = _Session(self.address, channel, self._events, self._call_timeout_s)
            self._events.connected(self.replica)
            try:
                with cairn_errors(f"node at {peer.address}"):
                    await session.seal(self._directory)
                    _log.info("member connected", replica=self.replica, address=peer.address)
                    self.why = ""
                    await session.run(self._directory)
            finally:
                self._session = None
                self._events.disconnected(self.replica)
        finally:
            await channel.close(None)

    async def _reach(self, channel: grpc.aio.Channel, address: str) -> None:
        try:
            async with asyncio.timeout(min(self._call_timeout_s, _REACH_S)):
                reached = await _until_decided(channel)
        except TimeoutError:
            reached = False
        if not reached:
            raise QuorumUnavailable(f"node at {address} cannot be reached")

    def _note(self, why: str) -> None:
        if why != self.why:
            _log.warning("member is away", replica=self.replica, why=why)
        self.why = why


async def _until_decided(channel: grpc.aio.Channel) -> bool:
    """Whether it is connected. False at the first refusal: gRPC would try again after longer and longer pauses."""
    refused = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state in refused:
            return False
        await channel.wait_for_state_change(state)
    return True


class _Session:
    """One connection to a member: what is sent on it, and what is expected back."""

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
        self._outgoing: deque[Append] = deque()
        self._ranges: deque[ReadFrom] = deque()
        self._wake_append = asyncio.Event()
        self._wake_read = asyncio.Event()
        self._asked: dict[int, int] = {}
        """Blocks expected, by attempt."""
        self._unanswered: deque[int] = deque()
        """Results that are missing, of each message of reads that was sent."""
        self._last_request = 0
        self._silent_since: float | None = None
        self._broken: asyncio.Future[None] = loop.create_future()
        self._asking: set[asyncio.Task[None]] = set()

    def send(self, message: SealEpoch | Append) -> None:
        if isinstance(message, SealEpoch):
            self._seal.set_result(message)
        else:
            self._outgoing.append(message)
            self._wake_append.set()

    def read(self, effect: ReadFrom) -> None:
        self._ranges.append(effect)
        self._wake_read.set()

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
        late = self._silent_since is not None and self._loop.time() - self._silent_since > self._call_timeout_s
        if late:
            self.break_off(f"it has not answered for {self._call_timeout_s} s")

    def break_off(self, why: str) -> None:
        if not self._broken.done():
            self._broken.set_exception(QuorumUnavailable(why))

    async def seal(self, directory: MemberDirectory) -> None:
        """Seal the member's log, and tell the answer."""
        seal = await self._seal
        known = max(seal.known, directory.known(self._address.replica))
        request = encode_seal(self._address, seal, directory.peers(), known)
        stub = replica_pb2_grpc.ReplicaStub(self._channel)
        response: pb.SealEpochResponse = await stub.SealEpoch(request, timeout=self._call_timeout_s)
        self._events.answered(self._address.replica, decode_seal_answer(response, seal))

    async def run(self, directory: MemberDirectory) -> None:
        """Carry records and reads until one of the streams ends: raises."""
        seal = await self._seal
        open_replicate: Any = self._channel.stream_stream(
            _REPLICATE, request_serializer=None, response_deserializer=pb.ReplicateResponse.FromString
        )
        open_read: Any = self._channel.stream_stream(
            _READ, request_serializer=pb.ReadRequest.SerializeToString, response_deserializer=None
        )
        replicate, read = open_replicate(), open_read()
        target = make_target(self._address, seal.epoch, seal.configuration)
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._send_appends(replicate, directory),
                self._take_answers(replicate, seal.epoch),
                self._send_reads(read, target),
                self._take_results(read),
            )
        ]
        done: set[asyncio.Future[None]] = set()
        try:
            done, _ = await asyncio.wait((*tasks, self._broken), return_when=asyncio.FIRST_COMPLETED)
            while done:
                done.pop().result()
            raise QuorumUnavailable("the node ended the stream")
        except asyncio.InvalidStateError as error:  # what gRPC raises for a write to a call that has ended
            raise QuorumUnavailable(f"the stream to the node has ended: {error}") from error
        finally:
            self._broken.cancel()
            for task in tasks:
                task.cancel()
            replicate.cancel()
            read.cancel()
            asking, self._asking = self._asking, set()
            for task in asking:
                task.cancel()
            await asyncio.gather(*tasks, *asking, return_exceptions=True)
            # A task keeps its error, that one its frames, and those the calls, which keep the connection open. Who
            # looks for circles comes by once in hours (see blockstore.cli.daemon_process), so none is left behind.
            done = set()
            tasks.clear()
            asking.clear()
            self._broken = self._loop.create_future()

    # ---- records

    async def _send_appends(self, replicate: Any, directory: MemberDirectory) -> None:
        target, configuration = b"", -1
        while True:
            while self._outgoing:
                message = self._outgoing.popleft()
                self._last_request = message.request
                if self._silent_since is None:
                    self._silent_since = self._loop.time()
                if message.configuration != configuration:
                    configuration = message.configuration
                    target = encode_target(self._address, message.epoch, configuration)
                await replicate.write(encode_append(target, message, directory.peer))
            self._wake_append.clear()
            await self._wake_append.wait()

    async def _take_answers(self, replicate: AsyncIterator[pb.ReplicateResponse], epoch: Epoch) -> None:
        async for response in replicate:
            self._silent_since = None if response.request >= self._last_request else self._loop.time()
            self._events.answered(self._address.replica, decode_append_answer(response, epoch))

    # ---- reads

    async def _send_reads(self, read: Any, target: pb.Target) -> None:
        while True:
            while self._ranges and len(self._unanswered) < _READS_IN_FLIGHT:
                asked = self._next_ranges()
                self._asked.update((each.attempt, each.count) for each in asked)
                self._unanswered.append(len(asked))
                request = pb.ReadRequest(
                    target=target,
                    commit=from_position(max(each.commit for each in asked)),
                    ranges=[pb.ReadRange(request=each.attempt, start=each.start, count=each.count) for each in asked],
                )
                await read.write(request)
            self._wake_read.clear()
            await self._wake_read.wait()

    def _next_ranges(self) -> list[ReadFrom]:
        """What one message asks for; there is at least one."""
        asked = [self._ranges.popleft()]
        blocks = asked[0].count
        while self._ranges and blocks + self._ranges[0].count <= _MAX_BLOCKS:
            blocks += self._ranges[0].count
            asked.append(self._ranges.popleft())
        return asked

    async def _take_results(self, read: AsyncIterator[bytes]) -> None:
        async for message in read:
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
        self._unanswered[0] -= 1
        if not self._unanswered[0]:
            self._unanswered.popleft()
            self._wake_read.set()
