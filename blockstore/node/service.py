"""The Replica service: what front-ends, control and peers ask of this node's replicas.

A stream of Replicate is read one message at a time, and no further while the node holds as much as
it may. Its answers are cumulative, so only the latest one waits when the other side is slow. Reads are
answered inline: the tables take microseconds, a thread would take more.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import grpc

from blockstore.config import NodeSettings
from blockstore.errors import CairnError, Corrupt
from blockstore.grpc_endpoint import Endpoint
from blockstore.grpc_errors import status_of
from blockstore.node.block_status import block_status
from blockstore.node.catch_up_server import serve_delta, serve_log
from blockstore.node.generations import describe, list_changes, read_generation
from blockstore.node.hosted_replica import AnswerMessage, HostedReplica
from blockstore.node.node import Node
from blockstore.node.scrub_server import digest, show_extent
from blockstore.replica_codec import (
    absent_entry,
    check_size,
    decode_read_request,
    decode_replicate,
    decode_seal,
    encode_append_answer,
    encode_read_response,
    encode_seal_answer,
    fenced_error,
    result_entry,
    to_address,
    to_position,
)
from blockstore.replication.messages import AppendAnswer, FencedBy
from blockstore.rpc import replica_pb2, replica_pb2_grpc
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import BLOCK_SIZE, MIB, BlockNumber, Epoch, Generation, Sequence

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

#: Of one message of read results.
_RESPONSE_BYTES: Final = 2 * MIB
_MAX_REPAIRS: Final = 256


def add_replica_service(node: Node, settings: NodeSettings, endpoint: Endpoint) -> None:
    """Serve the node's replicas at `endpoint`, the hot calls with messages as bytes."""
    service = ReplicaService(node, settings)
    by_hand = {
        "Replicate": grpc.stream_stream_rpc_method_handler(
            service.Replicate, None, pb.ReplicateResponse.SerializeToString
        ),
        "Read": grpc.stream_stream_rpc_method_handler(service.Read, None, None),
        "ReadGeneration": grpc.unary_unary_rpc_method_handler(
            service.ReadGeneration, pb.ReadGenerationRequest.FromString, None
        ),
    }
    name = replica_pb2.DESCRIPTOR.services_by_name["Replica"].full_name
    endpoint.add_service(name, replica_pb2_grpc.add_ReplicaServicer_to_server, service, by_hand)


class ReplicaService(replica_pb2_grpc.ReplicaServicer):
    """Errors leave it as CairnError; the endpoint's interceptor turns them into a status."""

    def __init__(self, node: Node, settings: NodeSettings) -> None:
        self._node = node
        self._settings = settings
        self._traffic = node.traffic

    async def Create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        address = to_address(request.target)
        created = await self._node.create(address, filling=request.filling, source=request.source)
        return pb.CreateResponse(created=created)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        return pb.DeleteResponse(deleted=await self._node.delete(to_address(request.target)))

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        return pb.ListReplicasResponse(replicas=self._node.replica_statuses())

    async def SealEpoch(self, request: pb.SealEpochRequest, context: Context) -> pb.SealEpochResponse:
        hosted = self._node.find(to_address(request.target))
        hosted.set_peers(request.peers)
        return encode_seal_answer(await hosted.seal(decode_seal(request)))

    async def Replicate(  # type: ignore[override]  # parsed by hand
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[pb.ReplicateResponse]:
        outbox = _Outbox()
        reader = asyncio.get_running_loop().create_task(self._take_in(request_iterator, outbox))
        reader.add_done_callback(lambda _: outbox.close())
        try:
            async for answer in outbox:
                yield encode_append_answer(answer)
                if isinstance(answer, FencedBy):
                    return
            await reader
        finally:
            reader.cancel()

    async def Read(  # type: ignore[override]  # parsed and serialized by hand
        self, request_iterator: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        async for encoded in request_iterator:
            request = decode_read_request(encoded)
            self._traffic.note()
            sender = request.target
            hosted = self._node.find(to_address(sender))
            refusal = hosted.refuse_read(Epoch(sender.epoch), sender.configuration, to_position(request.commit))
            results = _Results()
            for asked in request.ranges:
                if results.size_bytes >= _RESPONSE_BYTES:
                    yield results.encode()
                    results = _Results()
                self._read(hosted, asked, refusal, results)
            yield results.encode()

    async def BlockStatus(self, request: pb.BlockStatusRequest, context: Context) -> pb.BlockStatusResponse:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            return await block_status(hosted, request)

    async def FetchLog(self, request: pb.FetchLogRequest, context: Context) -> AsyncIterator[pb.FetchLogResponse]:
        hosted = self._serving_peer(request.target)
        async for response in serve_log(hosted, self._node.journal, request):
            yield response

    async def FetchDelta(self, request: pb.FetchDeltaRequest, context: Context) -> AsyncIterator[pb.FetchDeltaResponse]:
        async for response in serve_delta(self._serving_peer(request.target), request):
            yield response

    async def FetchBlocks(self, request: pb.FetchBlocksRequest, context: Context) -> pb.FetchBlocksResponse:
        # Nobody is fenced: a version is the same in every epoch, and the checksum that is kept for it decides.
        hosted = self._node.find(to_address(request.target))
        asked = request.blocks[:_MAX_REPAIRS]
        blocks = [_good_copy(hosted, version) for version in asked]
        if not all(blocks) and hosted.store.unapplied_bytes:
            # It may be committed here and not in the tables yet.
            await hosted.checkpoint()
            blocks = [_good_copy(hosted, version) for version in asked]
        return pb.FetchBlocksResponse(blocks=blocks)

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            return await describe(hosted, request)

    async def ListChanges(
        self, request: pb.ListChangesRequest, context: Context
    ) -> AsyncIterator[pb.ListChangesResponse]:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            async for response in list_changes(hosted, request):
                yield response

    async def Digest(self, request: pb.DigestRequest, context: Context) -> pb.DigestResponse:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            return await digest(hosted, request, self._traffic, self._node.repair)

    async def ShowExtent(self, request: pb.ShowExtentRequest, context: Context) -> pb.ShowExtentResponse:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            return await show_extent(hosted, request)

    async def Scrub(self, request: pb.ScrubRequest, context: Context) -> pb.ScrubResponse:
        hosted = self._node.find(to_address(request.target))
        hosted.set_members(request.peers)
        return pb.ScrubResponse(number=self._node.scrubber.begin(hosted, request.rate_bytes))

    async def ReadGeneration(  # type: ignore[override]  # serialized by hand
        self, request: pb.ReadGenerationRequest, context: Context
    ) -> bytes:
        hosted = self._node.find(to_address(request.target))
        with self._repairing(hosted):
            return await read_generation(hosted, request, self._traffic)

    @contextmanager
    def _repairing(self, hosted: HostedReplica) -> Iterator[None]:
        """Who asks is told of damage, and may ask another replica; meanwhile it is mended here."""
        try:
            yield
        except Corrupt as error:
            self._node.repair(hosted, error)
            raise

    async def _take_in(self, requests: AsyncIterator[bytes], outbox: "_Outbox") -> None:
        memory = self._node.memory
        async for encoded in requests:
            request, message = decode_replicate(encoded)
            self._traffic.note_records(message.records)
            hosted = self._node.find(to_address(request.target))
            if message.catch_up is not None:
                hosted.set_peers(request.catch_up.peers)
            if not memory.has_room(hosted.replica):
                # What it commits may be what makes room.
                hosted.append(outbox, replace(message, records=(), catch_up=None))
                await memory.wait_for_room(hosted.replica)
            hosted.append(outbox, message)

    def _read(
        self, hosted: HostedReplica, asked: pb.ReadRange, refusal: CairnError | None, results: "_Results"
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
                self._node.repair(hosted, error)
            results.refuse(asked.request, error)

    def _serving_peer(self, target: pb.Target) -> HostedReplica:
        """The replica that a peer asks; a peer that was fenced is told so."""
        hosted = self._node.find(to_address(target))
        own = hosted.follower
        if (target.epoch, target.configuration) < (own.epoch, own.configuration):
            raise fenced_error(FencedBy(own.epoch, own.configuration))
        return hosted


def _good_copy(hosted: HostedReplica, version: pb.BlockVersion) -> bytes:
    """The tables' copy of exactly this version; empty where they have none that is good."""
    number, generation = BlockNumber(version.number), Generation(version.generation)
    return hosted.store.block_version(number, generation, Sequence(version.sequence)) or b""


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

    def encode(self) -> bytes:
        return encode_read_response(b"".join(self._entries), self._payload, self._message, b"".join(self._absent))


class _Outbox:
    """The latest answer of one stream. Answers are cumulative: an older one is not missed."""

    def __init__(self) -> None:
        self._answer: AppendAnswer | FencedBy | None = None
        self._closed = False
        self._wake = asyncio.Event()

    def deliver(self, message: AnswerMessage) -> None:
        assert isinstance(message, AppendAnswer | FencedBy)
        if not isinstance(self._answer, FencedBy):
            self._answer = message
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    def __aiter__(self) -> "_Outbox":
        return self

    async def __anext__(self) -> AppendAnswer | FencedBy:
        while self._answer is None:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        answer, self._answer = self._answer, None
        return answer
