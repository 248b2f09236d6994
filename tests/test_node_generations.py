"""What nodes tell of sealed generations, over real gRPC: for whoever ships a snapshot or fills a restored volume."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import xxhash

from blockstore.domain import ReplicaId, make_id
from blockstore.errors import (
    AlreadyExists,
    CairnError,
    Conflict,
    Corrupt,
    InvalidRequest,
    NotFound,
    OutOfRange,
    QuorumUnavailable,
)
from blockstore.grpc_endpoint import open_channel
from blockstore.grpc_errors import cairn_errors
from blockstore.node import generations
from blockstore.replica_codec import from_position
from blockstore.rpc import replica_pb2 as pb
from blockstore.rpc import replica_pb2_grpc
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_BLOCKS, MIB
from tests.stack import LIMIT_S, SEGMENT, VOLUME, Stack, in_loop, running_stack, until
from tests.test_node_upkeep import damage

SIZE = 32 * MIB
SNAPSHOT = b"snap-1"


class Caller:
    """Calls one node's service, about its replica by default."""

    def __init__(self, channel: grpc.aio.Channel, replica: ReplicaId) -> None:
        self.channel = channel
        self.stub = replica_pb2_grpc.ReplicaStub(channel)
        self.target = pb.Target(volume=VOLUME, segment=SEGMENT, replica=replica)

    async def call(self, method: str, request: Any) -> Any:
        with cairn_errors("the node"):
            return await getattr(self.stub, method)(request, timeout=LIMIT_S)

    async def describe(self, **fields: Any) -> pb.DescribeResponse:
        found: pb.DescribeResponse = await self.call("Describe", pb.DescribeRequest(target=self.target, **fields))
        return found

    async def changes(self, lowest: int, highest: int) -> set[int]:
        request = pb.ListChangesRequest(target=self.target, lowest=lowest, highest=highest)
        found: set[int] = set()
        with cairn_errors("the node"):
            async for response in self.stub.ListChanges(request, timeout=LIMIT_S):
                for each in response.extents:
                    bits = int.from_bytes(each.blocks, "little")
                    found |= {each.extent * EXTENT_BLOCKS + i for i in range(EXTENT_BLOCKS) if bits >> i & 1}
        return found

    async def read(self, generation: int, *ranges: tuple[int, int]) -> bytes:
        request = pb.ReadGenerationRequest(
            target=self.target,
            generation=generation,
            ranges=[pb.BlockRange(start=start, count=count) for start, count in ranges],
        )
        response: pb.ReadGenerationResponse = await self.call("ReadGeneration", request)
        assert response.checksum == xxhash.xxh3_64_intdigest(response.payload)
        return response.payload


@asynccontextmanager
async def calling(stack: Stack, index: int) -> AsyncIterator[Caller]:
    channel = open_channel(stack.addresses()[stack.replicas[index]])
    try:
        yield Caller(channel, stack.replicas[index])
    finally:
        await channel.close(None)


def test_a_sealed_generation_is_described_listed_and_read(tmp_path: Path) -> None:
    """Right after its seal was committed: nobody waits for a checkpoint to come by itself."""

    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 1) as node:
            volume = await stack.open(SIZE)
            old, new = os.urandom(2 * BLOCK_SIZE), os.urandom(BLOCK_SIZE)
            await volume.write(9, old)
            await volume.write(4000, new)
            await volume.seal(SNAPSHOT)
            await volume.write(9, new)
            await volume.trim(4000, 1)
            await volume.seal(b"snap-2")
            await volume.write(77, new)
            await stack.until_all_know(volume)

            assert await node.read(1, (9, 2), (4000, 1), (5000, 1)) == old + new + bytes(BLOCK_SIZE)
            assert await node.changes(1, 1) == {9, 10, 4000}
            assert await node.changes(2, 2) == {9, 4000}
            assert await node.changes(1, 2) == {9, 10, 4000}
            assert await node.changes(0, 0xFFFFFFFF) >= {9, 10, 77, 4000}
            assert await node.read(2, (9, 2), (4000, 1)) == new + old[BLOCK_SIZE:] + bytes(BLOCK_SIZE)

            found = await node.describe(applied=from_position(volume.status().commit))
            assert (found.generation, found.source) == (3, b"")
            assert found.applied.sequence >= volume.status().commit.sequence
            assert [(each.generation, each.argument, list(each.pins)) for each in found.sealed] == [
                (1, SNAPSHOT, [SNAPSHOT]),
                (2, b"snap-2", [b"snap-2"]),
            ]
            assert found.sealed[0].sequence < found.sealed[1].sequence

    in_loop(test)


def test_two_seals_for_one_snapshot_are_both_told_and_let_go_one_by_one(tmp_path: Path) -> None:
    """A retry in a new epoch seals again: the first one is the snapshot's, the other's pin can be taken away."""

    async def test() -> None:
        async with running_stack(tmp_path, upkeep_s=0.1) as stack, calling(stack, 0) as node:
            volume = await stack.open(SIZE)
            await volume.write(1, b"a" * BLOCK_SIZE)
            await volume.seal(SNAPSHOT)
            volume = await stack.open(SIZE)
            await volume.write(1, b"b" * BLOCK_SIZE)
            second = (await volume.seal(SNAPSHOT)).generation
            await stack.until_all_know(volume)
            found = await node.describe(applied=from_position(volume.status().commit))
            assert [(each.generation, each.argument, list(each.pins)) for each in found.sealed] == [
                (1, SNAPSHOT, [SNAPSHOT]),
                (second, SNAPSHOT, [SNAPSHOT]),
            ]
            await volume.unpin(second, SNAPSHOT)
            await stack.until_all_know(volume)
            await node.describe(applied=from_position(volume.status().commit))
            hosted = stack.hosted(0)
            await until(lambda: len(hosted.store.sealed.describe().sealed) == 1, "the second one is merged away")
            assert await node.read(1, (1, 1)) == b"a" * BLOCK_SIZE
            with pytest.raises(NotFound):
                await node.read(second, (1, 1))
            with pytest.raises(NotFound):
                await node.changes(1, second)

    in_loop(test)


def test_what_makes_no_sense_is_refused_and_said(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 0) as node:
            volume = await stack.open(SIZE)
            await volume.write(1, b"a" * BLOCK_SIZE)
            await volume.seal(SNAPSHOT)
            await stack.until_all_know(volume)

            async def refused(error: type[CairnError], call: Any, match: str) -> None:
                with pytest.raises(error, match=match):
                    await call

            await refused(InvalidRequest, node.read(0, (0, 1)), "generation 0")
            await refused(InvalidRequest, node.read(1), "0 blocks")
            await refused(OutOfRange, node.read(1, (0, 0), (1, 1)), "0 blocks from 0")
            await refused(InvalidRequest, node.read(1, (0, 200), (300, 57)), "257 blocks")
            await refused(OutOfRange, node.read(1, (MAX_BLOCKS - 1, 2)), "2 blocks from")
            await refused(NotFound, node.read(2, (0, 1)), "generation 2 is not sealed")
            await refused(NotFound, node.changes(1, 2), "generation 2 is not sealed")
            await refused(InvalidRequest, node.changes(2, 1), "2 to 1")
            await refused(InvalidRequest, node.changes(0, 0), "0 to 0")
            beyond = volume.status().end._replace(sequence=10_000)  # type: ignore[arg-type]
            await refused(QuorumUnavailable, node.describe(applied=from_position(beyond)), "10000")
            node.target.replica = make_id("rep", b"elsewhere")
            await refused(NotFound, node.describe(), "no replica")
            await refused(NotFound, node.changes(1, 1), "no replica")
            await refused(NotFound, node.read(1, (0, 1)), "no replica")

    in_loop(test)


def test_a_filling_replica_sends_everybody_to_another_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 0) as node:
            filling = ReplicaId(make_id("rep", b"newcomer!"))
            node.target.replica = filling
            request = pb.CreateRequest(target=node.target, filling=True)
            assert (await node.call("Create", request)).created
            for call in (node.describe(), node.changes(1, 0xFFFFFFFF), node.read(1, (0, 1))):
                with pytest.raises(QuorumUnavailable, match="filling"):
                    await call

    in_loop(test)


def test_a_damaged_block_is_told_and_mended(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 1) as node:
            volume = await stack.open(SIZE)
            content = os.urandom(BLOCK_SIZE)
            await volume.write(77, content)
            await volume.seal(SNAPSHOT)
            await stack.until_all_know(volume)
            await stack.hosted(1).checkpoint()
            damage(next((tmp_path / "node1").rglob("tables.mdb")), content[:4080])
            with pytest.raises(Corrupt):
                await node.read(1, (77, 1))
            await until(lambda: stack.repaired(1) == 1, "the block is mended")
            assert await node.read(1, (77, 1)) == content

    in_loop(test)


def test_a_source_is_made_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 0) as node:
            node.target.replica = make_id("rep", b"restored!")

            async def create(source: bytes) -> bool:
                response: pb.CreateResponse = await node.call(
                    "Create", pb.CreateRequest(target=node.target, source=source)
                )
                return response.created

            assert await create(SNAPSHOT)
            assert not await create(SNAPSHOT)
            for other in (b"snap-2", b""):
                with pytest.raises(Conflict, match="snap-1"):
                    await create(other)
            with pytest.raises(InvalidRequest, match="300 bytes"):
                await create(b"s" * 300)
            assert (await node.describe()).source == SNAPSHOT
            node.target.volume = make_id("vol", b"different")
            with pytest.raises(AlreadyExists):
                await create(SNAPSHOT)
            node.target.replica = stack.replicas[0]
            node.target.volume = VOLUME
            with pytest.raises(Conflict):
                await create(SNAPSHOT)

    in_loop(test)


def test_garbage_where_a_read_is_expected_is_the_senders_fault(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 0) as node:
            read: Any = node.channel.stream_stream  # gRPC's types know nothing of messages that are bytes
            call = read("/cairn.v1.Replica/Read")(timeout=LIMIT_S)
            await call.write(b"\xff\xff\xff garbage")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await asyncio.wait_for(call.read(), LIMIT_S)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    in_loop(test)


def test_a_list_comes_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "PAGE_EXTENTS", 2)

    async def test() -> None:
        async with running_stack(tmp_path) as stack, calling(stack, 0) as node:
            volume = await stack.open(SIZE)
            blocks = {0, 300, 301, 512, 2000, 8191}
            for number in sorted(blocks):
                await volume.write(number, b"a" * BLOCK_SIZE)
            await volume.seal(SNAPSHOT)
            await stack.until_all_know(volume)
            assert await node.changes(1, 1) == blocks

    in_loop(test)
