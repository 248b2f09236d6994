"""Channels and calls as grpc.aio has them, over the simulated network.

Requests and answers cross as bytes, by the serializers of the stubs and handlers, in their order. A connection that
ends, ends its calls with UNAVAILABLE, and the handlers on the other side are cancelled.
"""

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from blockstore.grpc_endpoint import CONTROL_SERVICE
from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.network import Connection, Network, name_of
from tests.cluster_simulation.processes import CURRENT
from tests.cluster_simulation.server import ServerSide

#: How long an attempt to connect may take; and until the next one.
_CONNECT_S: Final = 2.0
_RECONNECT_S: Final = 0.3


class Channel:
    """As grpc.aio.insecure_channel gives it."""

    def __init__(self, network: Network, address: str) -> None:
        self._network, self._address = network, address
        self._connection: Connection | None = None
        self._calls: dict[_Call, None] = {}
        self._dialling: asyncio.Task[Connection] | None = None

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """One attempt each time that it is asked to try and none is under way."""
        if self._connection is not None and self._connection.open:
            return grpc.ChannelConnectivity.READY
        if self._dialling is not None and not self._dialling.done():
            return grpc.ChannelConnectivity.CONNECTING
        if self._dialling is not None:
            failed, self._dialling = self._dialling, None
            if failed.cancelled() or failed.exception() is not None:
                return grpc.ChannelConnectivity.TRANSIENT_FAILURE
        if not try_to_connect:
            return grpc.ChannelConnectivity.IDLE
        self._dialling = self._network.loop.create_task(self.connect())
        return grpc.ChannelConnectivity.CONNECTING

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """While it connects; a change of a connection that stands is not waited for by anybody."""
        assert last_observed_state is grpc.ChannelConnectivity.CONNECTING, f"not simulated: {last_observed_state}"
        if self._dialling is not None:
            await asyncio.wait([self._dialling])

    async def connect(self) -> Connection:
        """Raises ConnectionError where nobody listens, or nothing gets through."""
        if self._connection is not None and self._connection.open:
            return self._connection
        server, me = self._network.servers.get(self._address), name_of(CURRENT.get())
        await asyncio.sleep(self._network.delay_s(me))
        if server is None:
            raise ConnectionRefusedError("connection refused")
        there = name_of(server.process)
        if self._network.is_cut(me, there) or self._network.is_cut(there, me):
            await asyncio.sleep(_CONNECT_S)
            raise ConnectionError("connection timed out")
        if self._network.servers.get(self._address) is not server:
            raise ConnectionRefusedError("connection refused")
        if self._connection is None or not self._connection.open:
            self._connection = Connection(self._network, server)
        return self._connection

    async def close(self, grace: float | None = None) -> None:
        for call in list(self._calls):
            call.cancel()
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            self._connection.end("the channel was closed")

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        return self._multi(method, request_serializer, response_deserializer, _UnaryCall)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        return self._multi(method, request_serializer, response_deserializer, _StreamCall)

    # A call takes one request or a stream of them all the same.
    stream_unary = unary_unary
    stream_stream = unary_stream

    def _multi(self, method: str, serialize: Any, deserialize: Any, kind: "type[_Call]") -> Any:
        def call(request: Any = None, timeout: float | None = None, **_: Any) -> _Call:
            made = kind(self, self._network.loop, method, serialize, deserialize)
            self._calls[made] = None
            made.ended.add_done_callback(lambda _: self._calls.pop(made, None))
            made.begin(request, timeout)
            return made

        return call


class ActiveChannel(Channel):
    """To several controls, as gRPC's round robin with health checks: a call goes to one that says it is serving."""

    def __init__(self, network: Network, addresses: list[str]) -> None:
        super().__init__(network, addresses[0])
        self._each = [Channel(network, address) for address in addresses]
        self._serving: dict[Channel, None] = {}
        self._heard: dict[Channel, None] = {}
        self._changed = asyncio.Event()
        self._watching = [network.loop.create_task(self._watch(each)) for each in self._each]

    async def connect(self) -> Connection:
        while not self._serving and len(self._heard) < len(self._each):
            await self._changed.wait()
        if not self._serving:
            raise ConnectionError("no address is serving")
        return await next(iter(self._serving)).connect()

    async def close(self, grace: float | None = None) -> None:
        for task in self._watching:
            task.cancel()
        await super().close(grace)
        for each in self._each:
            await each.close(grace)

    async def _watch(self, channel: Channel) -> None:
        request = health_pb2.HealthCheckRequest(service=CONTROL_SERVICE)
        while True:
            try:
                async for answer in health_pb2_grpc.HealthStub(channel).Watch(request):
                    self._hear(channel, answer.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.aio.AioRpcError:
                pass  # it is away: as one that does not serve
            self._hear(channel, False)
            await asyncio.sleep(_RECONNECT_S)

    def _hear(self, channel: Channel, serving: bool) -> None:
        self._heard[channel] = None
        if serving:
            self._serving[channel] = None
        else:
            self._serving.pop(channel, None)
        self._changed.set()
        self._changed = asyncio.Event()


def channel_to(network: Network, target: str, options: Any = ()) -> Channel:
    """As grpc.aio.insecure_channel."""
    if target.startswith("ipv4:"):
        return ActiveChannel(network, target.removeprefix("ipv4:").split(","))
    return Channel(network, target)


class _Call:
    """The client's side of a call."""

    def __init__(self, channel: Channel, loop: SimulationLoop, method: str, serialize: Any, deserialize: Any) -> None:
        self._channel, self._loop, self._method = channel, loop, method
        self._serialize, self._deserialize = serialize or bytes, deserialize or bytes
        self.ended: asyncio.Future[grpc.aio.AioRpcError | None] = loop.create_future()
        """None, or what it ended with."""
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._side: ServerSide | None = None
        self._connection: Connection | None = None
        self._sending: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._connected: asyncio.Future[None] = loop.create_future()

    def begin(self, request: Any, timeout: float | None) -> None:
        if timeout is not None:
            self._timer = self._loop.call_later(max(0.0, timeout), self._late)
        self._sending = self._loop.create_task(self._run(request))

    async def _run(self, request: Any) -> None:
        try:
            connection = self._connection = await self._channel.connect()
        except ConnectionError as error:
            self.finish(grpc.StatusCode.UNAVAILABLE, f"failed to connect: {error}")
            return
        if self.ended.done():
            return
        connection.calls[self] = None
        self.ended.add_done_callback(lambda _: connection.calls.pop(self, None))
        side = self._side = ServerSide(self, connection, self._method)
        connection.to_server(side.begin)
        if not self._connected.done():
            self._connected.set_result(None)
        if hasattr(request, "__aiter__"):
            async for each in request:
                await self.write(each)
            await self.done_writing()
        elif hasattr(request, "__next__"):
            for each in request:
                await self.write(each)
            await self.done_writing()
        elif request is not None:
            await self.write(request)
            await self.done_writing()

    async def write(self, request: Any) -> None:
        if self.ended.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        if not self._connected.done():
            waited: set[asyncio.Future[Any]] = {self._connected, self.ended}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self.ended.done():
                await self._next()  # raises what it ended with
                raise asyncio.InvalidStateError("RPC already finished.")
        assert self._connection is not None
        side = self._side
        assert side is not None
        data = self._serialize(request)
        self._connection.to_server(lambda: side.requests.put_nowait(data))

    async def done_writing(self) -> None:
        side = self._side
        if not self.ended.done() and self._connection is not None and side is not None:
            self._connection.to_server(lambda: side.requests.put_nowait(None))

    def cancel(self) -> bool:
        if self.ended.done():
            return False
        if self._connection is not None and self._side is not None:
            self._connection.to_server(self._side.cancel)
        self.finish(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        return True

    def cancelled(self) -> bool:
        return self.ended.done() and (error := self.ended.result()) is not None and error.code() is _CANCELLED

    def done(self) -> bool:
        return self.ended.done()

    def cut_off(self, why: str) -> None:
        """The connection ended."""
        if self._side is not None:
            self._side.cancel()
        self.finish(grpc.StatusCode.UNAVAILABLE, why)

    def answer(self, data: bytes) -> None:
        if not self.ended.done():
            self._answers.put_nowait(data)

    def finish(self, code: grpc.StatusCode, details: str) -> None:
        if self.ended.done():
            return
        if self._timer is not None:
            self._timer.cancel()
        if self._sending is not None and self._sending is not asyncio.current_task(self._loop):
            self._sending.cancel()
        empty: Any = grpc.aio.Metadata()
        error = None if code is grpc.StatusCode.OK else grpc.aio.AioRpcError(code, empty, empty, details, None)
        self.ended.set_result(error)
        self._answers.put_nowait(None)

    def _late(self) -> None:
        if self._connection is not None and self._side is not None:
            self._connection.to_server(self._side.cancel)
        self.finish(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    async def _next(self) -> bytes | None:
        """The next answer, None after the last one. Raises what the call ended with."""
        data = await self._answers.get()
        if data is None:
            self._answers.put_nowait(None)
            if error := self.ended.result():
                if error.code() is _CANCELLED and self._channel is not None:
                    raise asyncio.CancelledError
                raise error
        return data


_CANCELLED: Final = grpc.StatusCode.CANCELLED


class _UnaryCall(_Call):
    def __await__(self) -> Any:
        return self._result().__await__()

    async def _result(self) -> Any:
        try:
            data = await self._next()
        except asyncio.CancelledError:
            self.cancel()
            raise
        assert data is not None
        return self._deserialize(data)


class _StreamCall(_Call):
    def __aiter__(self) -> "_StreamCall":
        return self

    async def __anext__(self) -> Any:
        try:
            data = await self._next()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is None:
            raise StopAsyncIteration
        return self._deserialize(data)
