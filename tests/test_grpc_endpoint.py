"""Connections end where the other side says nothing any more, also for calls that wait without a deadline."""

import asyncio
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from blockstore.grpc_endpoint import Endpoint, open_channel
from blockstore.rpc import replica_pb2
from tests.daemons import Daemon

#: A ping each 2 s, answered within 3 s; and time for a busy machine. gRPC's own limit is 60 s.
_GIVEN_UP_S = 50.0
_SERVER = """
import asyncio, sys
from pathlib import Path
from blockstore.daemon import write_address
from blockstore.grpc_endpoint import Endpoint

async def serve():
    endpoint = Endpoint("127.0.0.1:0")
    await endpoint.start()
    write_address(Path(sys.argv[1]) / "address", endpoint.address)
    await asyncio.Event().wait()

asyncio.run(serve())
"""


def test_a_process_that_hangs_is_given_up(tmp_path: Path) -> None:
    server = Daemon("server", [sys.executable, "-c", _SERVER, tmp_path], tmp_path, tmp_path / "log")

    async def watch() -> None:
        channel = open_channel(server.read_address())
        stub = health_pb2_grpc.HealthStub(channel)
        answers = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await answers.read()).status == health_pb2.HealthCheckResponse.SERVING
        server.pause()
        async with asyncio.timeout(_GIVEN_UP_S):
            await answers.read()

    server.start()
    try:
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            asyncio.run(watch())
    finally:
        server.kill()


def test_services_can_be_looked_at() -> None:
    """Twice, as the first look imports what it takes."""
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")] * 2
    asked.append(reflection_pb2.ServerReflectionRequest(file_containing_symbol="cairn.v1.Replica"))

    async def look() -> list[reflection_pb2.ServerReflectionResponse]:
        endpoint = Endpoint("127.0.0.1:0")
        endpoint.add_names([replica_pb2.DESCRIPTOR.services_by_name["Replica"].full_name])
        await endpoint.start()
        async with open_channel(endpoint.address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            found = [each async for each in stub.ServerReflectionInfo(iter(asked), timeout=60)]
        await endpoint.stop(0)
        return found

    first, second, described = asyncio.run(look())
    names = {each.name for each in first.list_services_response.service}
    assert names == {"cairn.v1.Replica", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert second == first
    assert described.file_descriptor_response.file_descriptor_proto
