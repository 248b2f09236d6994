"""The streams of the hot path on the node's side: a leader's records, reads, and reads of sealed generations.

They come as streams of messages (blockstore.message_stream) or, where somebody cannot connect to these, of gRPC. What
a message does is the same here: it is carried out as it arrives, and no further one is taken while the node holds as
much as it may. Reads are answered inline: the tables take microseconds, a thread would take more. Those of sealed
generations are long and nobody's hurry: they run in threads (blockstore.node.generations), one of a stream at a time.
"""

from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from blockstore.append_codec import decode_append, encode_answer
from blockstore.domain import ReplicaAddress, ReplicaId
from blockstore.errors import CairnError, Corrupt, Fenced, InvalidRequest
from blockstore.grpc_errors import status_of
from blockstore.grpc_payload import parse
from blockstore.message_stream import Message, MessageServer, MessageStream, OnMessage
from blockstore.node.generations import read_generation
from blockstore.node.hosted_replica import AnswerMessage, HostedReplica, Reply
from blockstore.node.node import Node
from blockstore.replica_codec import (
    GENERATION_GREETING,
    READ_GREETING,
    REPLICATE_GREETING,
    absent_entry,
    check_size,
    decode_read_request,
    encode_generation,
    encode_read_response,
    greeting_to,
    result_entry,
    to_address,
    to_position,
)
from blockstore.replication.messages import Append, AppendAnswer, FencedBy
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, Epoch

#: Of one message of read results.
_RESPONSE_BYTES: Final = 2 * MIB


def take_append(
    node: Node, address: ReplicaAddress, reply: Reply, message: Append, peers: Iterable[pb.Peer]
) -> Awaitable[None] | None:
    """Carry out what a leader sent; what is returned, if anything, is to be awaited before its next message.

    peers: where those are that its catch_up names.
    """
    node.traffic.note_records(message.records)
    hosted = node.find(address)
    if message.catch_up is not None:
        hosted.set_peers(peers)
    if node.memory.has_room(hosted.replica):
        hosted.append(reply, message)
        return None
    # What it commits may be what makes room.
    hosted.append(reply, replace(message, records=(), catch_up=None))
    return _append_once_there_is_room(node, hosted, reply, message)


async def _append_once_there_is_room(node: Node, hosted: HostedReplica, reply: Reply, message: Append) -> None:
    await node.memory.wait_for_room(hosted.replica)
    hosted.append(reply, message)


def answer_reads(node: Node, encoded: Message) -> Iterator[list[bytes]]:
    """The answers to a serialized ReadRequest: serialized ReadResponses, each in parts."""
    request = decode_read_request(encoded)
    node.traffic.note()
    sender = request.target
    hosted = node.find(to_address(sender))
    refusal = hosted.refuse_read(Epoch(sender.epoch), sender.configuration, to_position(request.commit))
    results = _Results()
    for asked in request.ranges:
        if results.size_bytes >= _RESPONSE_BYTES:
            yield results.encode()
            results = _Results()
        _read(node, hosted, asked, refusal, results)
    yield results.encode()


def _read(
    node: Node, hosted: HostedReplica, asked: pb.ReadRange, refusal: CairnError | None, results: "_Results"
) -> None:
    try:
        if refusal is not None:
            raise refusal
        check_size(asked.count)
        if hosted.store.has_source:
            results.add(asked.request, *hosted.store.read_with_absent(asked.start, asked.count), asked.start)
        else:
            results.add(asked.request, hosted.store.read(asked.start, asked.count))
    except CairnError as error:
        if isinstance(error, Corrupt):
            node.repair(hosted, error)
        results.refuse(asked.request, error)


async def answer_generation(node: Node, request: pb.ReadGenerationRequest, streams_port: int) -> list[bytes]:
    """A serialized ReadGenerationResponse, in parts. Who asks is told of damage; meanwhile it is mended here."""
    hosted = node.find(to_address(request.target))
    try:
        payload = await read_generation(hosted, request)
    except Corrupt as error:
        node.repair(hosted, error)
        raise
    return encode_generation(payload, guests=node.traffic.busy, streams_port=streams_port)


class _Results:
    """What one message answers."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._entries: list[bytes] = []
        self._payload: list[bytes] = []
        self._absent: list[bytes] = []
        self._message = ""

    def add(self, request: int, data: bytes, absent: Iterable[tuple[int, int]] = (), start: int = 0) -> None:
        """absent: runs of blocks without an entry, (block number, count); start: the range's first block."""
        self.size_bytes += len(data)
        self._entries.append(result_entry(request, len(data) // BLOCK_SIZE, 0))
        self._payload.append(data)
        self._absent += [absent_entry(request, first - start, count) for first, count in absent]

    def refuse(self, request: int, error: CairnError) -> None:
        number: int = status_of(error).value[0]
        self._entries.append(result_entry(request, 0, number))
        self._message = str(error)

    def encode(self) -> list[bytes]:
        return encode_read_response(b"".join(self._entries), self._payload, self._message, b"".join(self._absent))


class ReplicaStreams:
    """Serves both as streams of messages. port: where, once started."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._server = MessageServer(self._accept)

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def open_count(self) -> int:
        """Two for each leader's connection, one for each read of a generation that somebody has under way."""
        return self._server.open_count

    async def start(self, host: str, port: int) -> None:
        """port: 0 takes a free one. Raises Conflict where it cannot be had."""
        await self._server.start(host, port)

    def stop(self) -> None:
        """End all streams."""
        self._server.stop()

    def _accept(self, stream: MessageStream, greeting: bytes) -> OnMessage:
        """Raises NotFound where it is meant for a replica of another node, as behind a wrong port."""
        hosted = self._node.find_replica(ReplicaId(greeting.rpartition(b" ")[2].decode(errors="replace")))
        if greeting == greeting_to(REPLICATE_GREETING, hosted.address):
            return _Records(self._node, hosted.address, stream).take
        if greeting == greeting_to(READ_GREETING, hosted.address):
            return _Reads(self._node, stream).take
        if greeting == greeting_to(GENERATION_GREETING, hosted.address):
            return _Generations(self._node, stream, self.port).take
        raise InvalidRequest(f"no stream to {hosted.replica} begins with {greeting[:128]!r}")


class _Records:
    """A leader's stream; what it sends is answered here. Answers are cumulative, and leave as they come."""

    def __init__(self, node: Node, address: ReplicaAddress, stream: MessageStream) -> None:
        self._node = node
        self._address = address
        self._stream = stream

    def take(self, message: Message) -> Awaitable[None] | None:
        received = decode_append(message)
        return take_append(self._node, self._address, self, received.message, received.peers)

    def deliver(self, message: AnswerMessage) -> None:
        assert isinstance(message, AppendAnswer | FencedBy)
        self._stream.send(encode_answer(message))
        if isinstance(message, FencedBy):
            self._stream.close(Fenced("a newer epoch was sealed"))


class _Reads:
    """A leader's stream of reads. It takes no further one while results wait for the network."""

    def __init__(self, node: Node, stream: MessageStream) -> None:
        self._node = node
        self._stream = stream

    def take(self, message: Message) -> Awaitable[None] | None:
        for answer in answer_reads(self._node, message):
            self._stream.send(*answer)
        return None if self._stream.writable else self._stream.drained()


class _Generations:
    """A stream of reads of sealed generations: each is answered before the next one is taken."""

    def __init__(self, node: Node, stream: MessageStream, streams_port: int) -> None:
        self._node = node
        self._stream = stream
        self._streams_port = streams_port

    async def take(self, message: Message) -> None:
        request = parse(pb.ReadGenerationRequest, message)
        self._stream.send(*await answer_generation(self._node, request, self._streams_port))
        await self._stream.drained()
