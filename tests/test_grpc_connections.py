"""Connections that are kept: one for each address, until it is wanted no more."""

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockstore.grpc_connections import Connections
from blockstore.grpc_endpoint import Endpoint


def _run(test: Callable[[Connections[health_pb2_grpc.HealthStub], str, str], Awaitable[None]]) -> None:
    """With two servers and no connection yet."""

    async def run() -> None:
        endpoints = [Endpoint("127.0.0.1:0") for _ in range(2)]
        connections = Connections(health_pb2_grpc.HealthStub)
        try:
            for each in endpoints:
                await each.start()
            await test(connections, *(each.address for each in endpoints))
        finally:
            await connections.close()
            for each in endpoints:
                await each.stop(0)

    asyncio.run(asyncio.wait_for(run(), 60))


async def _check(stub: health_pb2_grpc.HealthStub) -> None:
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=50)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_an_address_has_one_connection() -> None:
    async def test(connections: Connections[health_pb2_grpc.HealthStub], one: str, other: str) -> None:
        assert connections.to(one) is connections.to(one)
        assert connections.to(one) is not connections.to(other)
        await _check(connections.to(one))
        await _check(connections.to(other))

    _run(test)


def test_those_that_are_not_wanted_any_more_are_closed() -> None:
    async def test(connections: Connections[health_pb2_grpc.HealthStub], one: str, other: str) -> None:
        kept, gone = connections.to(one), connections.to(other)
        await _check(gone)
        watching = gone.Watch(health_pb2.HealthCheckRequest())
        await watching.read()
        await connections.keep_only([one, "127.0.0.1:1"])
        with pytest.raises(asyncio.CancelledError):
            await watching.read()
        with pytest.raises(grpc.aio.UsageError):
            await _check(gone)
        assert connections.to(one) is kept
        assert connections.to(other) is not gone
        await _check(connections.to(other))
        await connections.close()
        assert connections.to(one) is not kept

    _run(test)
