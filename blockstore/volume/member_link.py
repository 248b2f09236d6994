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
import xxhash

from blockstore.domain import Position, ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, Corrupt, QuorumUnavailable
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors, from_status
from blockstore.replica_codec import (
    decode_append_answer,
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
from blockstore.units import BLOCK_SIZE

_log = structlog.get_logger(__name__)
_REPLICATE: Final = "/cairn.v1.Replica/Replicate"
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 1.0
#: Ranges that one message asks for.
_MAX_RANGES: Final = 256
_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class LinkEvents(Protocol):
    """What a link tells. All are called in the event loop."""

    def connected(self, replica: ReplicaId) -> None: ...
    def disconnected(self, replica: ReplicaId) -> None: ...
    def answered(self, replica: ReplicaId, message: SealAnswer | AppendAnswer | FencedBy) -> None: ...
    def read_arrived(self, attempt: int, data: bytes) -> None: ...
    def read_failed(self, attempt: int, error: CairnError) -> None: ...


class Directory(Protocol):
    """Where members are, as far as is known, and what they are known to have acked."""

    def peer(self, replica: ReplicaId) -> pb.Peer: ...
    def peers(self) -> list[pb.Peer]: ...
    def known(self, replica: ReplicaId) -> Position: ...
    async def refresh(self) -> None:
        """Ask control anew, unless that was done a moment ago."""


class MemberLink:
    """Carries messages between a leader and one member.

    call_timeout_s: of a unary call, and of an answer on a stream.
    """

    def __init__(
        self, address: ReplicaAddress, events: LinkEvents, directory: Directory, call_timeout_s: float
    ) -> None:
        self.address = address
        self.why = "not connected yet"
        """Why there is no connection; empty where there is one."""
        self._events = events
        self._directory = directory
        self._call_timeout_s = call_timeout_s
        self._outgoing: deque[Append] = deque()
        self._ranges: deque[ReadFrom] = deque()
        self._seal: SealEpoch | None = None
        self._wake_append = asyncio.Event()
        self._wake_read = asyncio.Event()
        self._asked: dict[int, int] = {}
        """Blocks expected, by attempt."""
        self._last_request = 0
        self._silent_since: float | None = None
        self._broken: asyncio.Future[None] | None = None
        """While there is a connection; done when it is to end."""

    @property
    def replica(self) -> ReplicaId:
        return self.address.replica

    # ---- what the leader sends

    def send(self, message: SealEpoch | Append) -> None:
        """In order with what was sent before; lost where there is no connection."""
        if isinstance(message, SealEpoch):
            self._seal = message
        else:
            self._outgoing.append(message)
        self._wake_append.set()

    def read(self, effect: ReadFrom) -> None:
        """Ask for blocks; answered by read_arrived or read_failed, unless the connection breaks."""
        self._ranges.append(effect)
        self._wake_read.set()

    def check(self) -> None:
        """Break a connection whose other side has not answered for call_timeout_s."""
        since, broken = self._silent_since, self._broken
        if since is None or broken is None or broken.done():
            return
        if asyncio.get_running_loop().time() - since > self._call_timeout_s:
            broken.set_exception(QuorumUnavailable(f"it has not answered for {self._call_timeout_s} s"))

    # ---- connection

    async def run(self) -> None:
        """Connect, again and again, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._session()
            except CairnError as error:
                was_open = not self.why
                self._note(str(error))
                pause_s = _FIRST_PAUSE_S if was_open else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)
            await self._directory.refresh()

    async def _session(self) -> None:
        """One connection, until it breaks: it ends by raising."""
        peer = self._directory.peer(self.replica)
        if not peer.address:
            raise QuorumUnavailable("control does not know where its node is")
        channel = open_channel(peer.address)
        try:
            await self._reach(channel, peer.address)
            self._forget()
            self._events.connected(self.replica)
            try:
                await self._talk(channel, peer.address)
            finally:
                self._events.disconnected(self.replica)
        finally:
            await channel.close(None)

    async def _reach(self, channel: grpc.aio.Channel, address: str) -> None:
        try:
            await asyncio.wait_for(channel.channel_ready(), self._call_timeout_s)
        except TimeoutError:
            raise QuorumUnavailable(f"node at {address} cannot be reached") from None

    async def _talk(self, channel: grpc.aio.Channel, address: str) -> None:
        with cairn_errors(f"node at {address}"):
            seal = await self._sealed(channel)
            self.why = ""
            _log.info("member connected", replica=self.replica, address=address)
            target = make_target(self.address, seal.epoch, seal.configuration)
            replicate = channel.stream_stream(
                _REPLICATE, request_serializer=None, response_deserializer=pb.ReplicateResponse.FromString
            )(self._appends(encode_target(self.address, seal.epoch, seal.configuration)))
            read = replica_pb2_grpc.ReplicaStub(channel).Read(self._read_requests(target))
            await self._pump(seal, replicate, read)

    async def _sealed(self, channel: grpc.aio.Channel) -> SealEpoch:
        while self._seal is None:
            self._wake_append.clear()
            await self._wake_append.wait()
        seal = self._seal
        request = encode_seal(self.address, seal, self._directory.peers(), self._directory.known(self.replica))
        stub = replica_pb2_grpc.ReplicaStub(channel)
        response: pb.SealEpochResponse = await stub.SealEpoch(request, timeout=self._call_timeout_s)
        self._events.answered(self.replica, decode_seal_answer(response, seal))
        return seal

    async def _pump(self, seal: SealEpoch, replicate: Any, read: Any) -> None:
        """Take in answers and results until one of the streams ends."""
        answers = asyncio.create_task(self._take_answers(seal, replicate))
        results = asyncio.create_task(self._take_results(read))
        self._broken = asyncio.get_running_loop().create_future()
        try:
            done, _ = await asyncio.wait((answers, results, self._broken), return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            raise QuorumUnavailable("the node ended the stream")
        finally:
            self._broken = None
            for task in (answers, results):
                task.cancel()
            replicate.cancel()
            read.cancel()
            await asyncio.gather(answers, results, return_exceptions=True)

    # ---- records

    async def _appends(self, target: bytes) -> AsyncIterator[bytes]:
        while True:
            while self._outgoing:
                message = self._outgoing.popleft()
                self._last_request = message.request
                if self._silent_since is None:
                    self._silent_since = asyncio.get_running_loop().time()
                yield encode_append(target, message, self._directory.peer)
            self._wake_append.clear()
            await self._wake_append.wait()

    async def _take_answers(self, seal: SealEpoch, replicate: AsyncIterator[pb.ReplicateResponse]) -> None:
        async for response in replicate:
            now = asyncio.get_running_loop().time()
            self._silent_since = None if response.request >= self._last_request else now
            self._events.answered(self.replica, decode_append_answer(response, seal.epoch))

    # ---- reads

    async def _read_requests(self, target: pb.Target) -> AsyncIterator[pb.ReadRequest]:
        while True:
            while self._ranges:
                asked = [self._ranges.popleft() for _ in range(min(len(self._ranges), _MAX_RANGES))]
                self._asked.update((each.attempt, each.count) for each in asked)
                yield pb.ReadRequest(
                    target=target,
                    commit=from_position(max(each.commit for each in asked)),
                    ranges=[pb.ReadRange(request=each.attempt, start=each.start, count=each.count) for each in asked],
                )
            self._wake_read.clear()
            await self._wake_read.wait()

    async def _take_results(self, read: AsyncIterator[pb.ReadResponse]) -> None:
        async for response in read:
            for result in response.results:
                count = self._asked.pop(result.request, None)
                if count is not None:
                    self._take_result(result, count)

    def _take_result(self, result: pb.ReadResult, count: int) -> None:
        if result.status:
            error = from_status(_CODES.get(result.status, grpc.StatusCode.INTERNAL), result.message)
            self._events.read_failed(result.request, error)
            return
        data = result.data
        if len(data) != count * BLOCK_SIZE or xxhash.xxh3_64_intdigest(data, result.request) != result.checksum:
            self._events.read_failed(result.request, Corrupt(f"what {self.replica} sent fails its checksum"))
            return
        self._events.read_arrived(result.request, data)

    # ---- state

    def _forget(self) -> None:
        """Nothing of an earlier session is sent in this one."""
        self._outgoing.clear()
        self._ranges.clear()
        self._asked.clear()
        self._seal = None
        self._silent_since = None
        self._last_request = 0

    def _note(self, why: str) -> None:
        if why != self.why:
            _log.warning("member is away", replica=self.replica, why=why)
        self.why = why
