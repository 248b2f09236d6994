"""What carries a session's records and reads: streams of messages, or gRPC's where those cannot be had.

Both ask the session for the next message when they can send one, and give it what arrives.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Final, Protocol

import grpc

from blockstore.append_codec import decode_answer, encode_append
from blockstore.domain import ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, QuorumUnavailable
from blockstore.message_stream import Message, MessageStream, connect
from blockstore.replica_codec import (
    READ_GREETING,
    REPLICATE_GREETING,
    decode_append_answer,
    encode_replicate,
    encode_target,
    greeting_to,
)
from blockstore.replication.messages import Append, AppendAnswer, FencedBy
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import Epoch

_REPLICATE: Final = "/cairn.v1.Replica/Replicate"
_READ: Final = "/cairn.v1.Replica/Read"


class Carried(Protocol):
    """What is sent, None while there is nothing, and who takes what arrives: raises CairnError."""

    @property
    def epoch(self) -> Epoch: ...
    def peer(self, replica: ReplicaId) -> pb.Peer: ...
    def next_append(self) -> Append | None: ...
    def next_reads(self) -> list[bytes] | None: ...
    def take_answer(self, answer: AppendAnswer | FencedBy) -> None: ...
    def take_results(self, message: Message) -> None: ...


class Streams(ABC):
    """Two ways to a member, from the moment at which they are made until `run` has ended."""

    @abstractmethod
    def append_waits(self) -> None:
        """There is a next append."""

    @abstractmethod
    def reads_wait(self) -> None:
        """There may be next reads."""

    @abstractmethod
    async def run(self) -> None:
        """Until one of them ends: raises CairnError. Cancelled, it ends both."""


class MessageStreams(Streams):
    """Over two connections of their own. Nothing waits for a task: what can be sent leaves as it is asked for."""

    def __init__(self, carried: Carried) -> None:
        self._carried = carried
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._open: list[MessageStream] = []

    @classmethod
    async def to(cls, host: str, port: int, replica: ReplicaAddress, carried: Carried) -> "MessageStreams":
        """Raises CairnError where nobody takes them there, or somebody who has no such replica listens."""
        streams = cls(carried)
        try:
            for kind, take in ((REPLICATE_GREETING, streams._take_answer), (READ_GREETING, carried.take_results)):
                streams._open.append(await connect(host, port, greeting_to(kind, replica), take, streams._end))
        except BaseException:
            streams._close()
            raise
        return streams

    def append_waits(self) -> None:
        records = self._open[0]
        while records.writable:
            if (message := self._carried.next_append()) is None:
                return
            records.send(*encode_append(message, self._carried.peer))
        records.on_writable = self.append_waits

    def _take_answer(self, message: Message) -> None:
        self._carried.take_answer(decode_answer(message, self._carried.epoch))

    def reads_wait(self) -> None:
        reads = self._open[1]
        while reads.writable:
            if (parts := self._carried.next_reads()) is None:
                return
            reads.send(*parts)
        reads.on_writable = self.reads_wait

    async def run(self) -> None:
        self.append_waits()
        self.reads_wait()
        try:
            await self._ended
        finally:
            self._close()

    def _end(self, error: CairnError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _close(self) -> None:
        for stream in self._open:
            stream.close()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # it was told, or nobody asks any more


class GrpcStreams(Streams):
    """Over the channel that the calls go by as well."""

    def __init__(self, channel: grpc.aio.Channel, replica: ReplicaAddress, carried: Carried) -> None:
        self._channel = channel
        self._replica = replica
        self._carried = carried
        self._wake_append = asyncio.Event()
        self._wake_reads = asyncio.Event()

    def append_waits(self) -> None:
        self._wake_append.set()

    def reads_wait(self) -> None:
        self._wake_reads.set()

    async def run(self) -> None:
        replicate, read = self._open(_REPLICATE), self._open(_READ)
        tasks = [
            asyncio.create_task(work)
            for work in (
                _send(replicate, self._next_append, self._wake_append),
                _take(replicate, self._take_answer),
                _send(read, self._carried.next_reads, self._wake_reads),
                _take(read, self._carried.take_results),
            )
        ]
        done: set[asyncio.Task[None]] = set()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            while done:
                done.pop().result()
            raise QuorumUnavailable("the node ended the stream")
        except asyncio.InvalidStateError as error:  # what gRPC raises for a write to a call that has ended
            raise QuorumUnavailable(f"the stream to the node has ended: {error}") from error
        finally:
            for task in tasks:
                task.cancel()
            replicate.cancel()
            read.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # A task keeps its error, that one its frames, and those the calls, which keep the connection open. Who
            # looks for circles comes by once in hours (see blockstore.cli.daemon_process), so none is left behind.
            done = set()
            tasks.clear()

    def _next_append(self) -> list[bytes | memoryview] | None:
        if (message := self._carried.next_append()) is None:
            return None
        target = encode_target(self._replica, message.epoch, message.configuration)
        return encode_replicate(target, message, self._carried.peer)

    def _take_answer(self, message: bytes) -> None:
        response = pb.ReplicateResponse.FromString(message)
        self._carried.take_answer(decode_append_answer(response, self._carried.epoch))

    def _open(self, method: str) -> Any:
        call: Any = self._channel.stream_stream(method, request_serializer=None, response_deserializer=None)
        return call()


async def _send(call: Any, next_message: Any, wake: asyncio.Event) -> None:
    while True:
        while (parts := next_message()) is not None:
            await call.write(b"".join(parts))
        wake.clear()
        await wake.wait()


async def _take(call: AsyncIterator[bytes], take: Any) -> None:
    async for message in call:
        take(message)
