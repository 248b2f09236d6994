"""The Replica service: what front-ends, control and peers ask of this node's replicas.

A stream of Replicate is read one message at a time, and no further while the node holds as much as
it may. Its answers are cumulative, so only the latest one waits when the other side is slow. Reads are
answered inline: the tables take microseconds, a thread would take more.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc

from blockstore.config import NodeSettings
from blockstore.errors import Corrupt
from blockstore.grpc_endpoint import Endpoint
from blockstore.node.block_status import block_status
from blockstore.node.catch_up_server import serve_delta, serve_log
from blockstore.node.generations import describe, list_changes
from blockstore.node.hosted_replica import AnswerMessage, HostedReplica
from blockstore.node.node import Node
from blockstore.node.replica_streams import ReplicaStreams, answer_generation, answer_reads, take_append
from blockstore.node.scrub_server import digest, show_extent
from blockstore.replica_codec import (
    decode_replicate,
    decode_seal,
    encode_append_answer,
    encode_place,
    encode_seal_answer,
    fenced_error,
    to_address,
)
from blockstore.replication.messages import AppendAnswer, FencedBy
from blockstore.rpc import replica_pb2, replica_pb2_grpc
from blockstore.rpc import replica_pb2 as pb
from blockstore.units import MIB, BlockNumber, Generation, Sequence

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

#: Of one message of read results.
_RESPONSE_BYTES: Final = 2 * MIB
_MAX_REPAIRS: Final = 256


def add_replica_service(node: Node, streams: ReplicaStreams, settings: NodeSettings, endpoint: Endpoint) -> None:
    """Serve the node's replicas at `endpoint`, the hot calls with messages as bytes. streams: started or not."""
    service = ReplicaService(node, streams, settings)
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

    def __init__(self, node: Node, streams: ReplicaStreams, settings: NodeSettings) -> None:
        self._node = node
        self._streams = streams
        self._settings = settings
        self._traffic = node.traffic

    async def Create(self, request: pb.CreateRequest, context: Context) -> pb.CreateResponse:
        address = to_address(request.target)
        created = await self._node.create(address, filling=request.filling, source=request.source)
        return pb.CreateResponse(created=created)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteResponse:
        return pb.DeleteResponse(deleted=await self._node.delete(to_address(request.target)))

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        return pb.ListReplicasResponse(replicas=await self._node.statuses())

    async def SealEpoch(self, request: pb.SealEpochRequest, context: Context) -> pb.SealEpochResponse:
        hosted = self._node.find(to_address(request.target))
        hosted.set_peers(request.peers)
        answer = encode_seal_answer(await hosted.seal(decode_seal(request)))
        answer.streams_port = self._streams.port
        if (place := hosted.place) is not None:
            answer.tables.CopyFrom(encode_place(place))
        return answer

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
            for message in answer_reads(self._node, encoded):
                yield b"".join(message)

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
        return b"".join(await answer_generation(self._node, request, self._streams.port))

    @contextmanager
    def _repairing(self, hosted: HostedReplica) -> Iterator[None]:
        """Who asks is told of damage, and may ask another replica; meanwhile it is mended here."""
        try:
            yield
        except Corrupt as error:
            self._node.repair(hosted, error)
            raise

    async def _take_in(self, requests: AsyncIterator[bytes], outbox: "_Outbox") -> None:
        async for encoded in requests:
            request, message = decode_replicate(encoded)
            address, peers = to_address(request.target), request.catch_up.peers
            if (waiting := take_append(self._node, address, outbox, message, peers)) is not None:
                await waiting

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
    return hosted.store.repairs.version(number, generation, Sequence(version.sequence)) or b""


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
