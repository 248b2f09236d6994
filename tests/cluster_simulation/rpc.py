"""gRPC without its transport: channels and servers as grpc.aio has them, over the simulated network.

Requests and answers cross as bytes, by the serializers of the stubs and handlers. A connection keeps its order in each
direction. What is said over a link that is cut is held back, as TCP does, and the connection ends where that lasts
longer than keepalive allows; its calls then end with UNAVAILABLE, and the handlers on the other side are cancelled.
"""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, Final

import grpc

from tests.cluster_simulation.loop import SimulationLoop
from tests.cluster_simulation.processes import CURRENT, Process, in_process

#: Of grpc_endpoint's options: a ping each 2 s, which is answered within 2 s.
KEEPALIVE_S: Final = 4.0
#: How long an attempt to connect may take.
_CONNECT_S: Final = 2.0


class Network:
    """Who listens where, and which links are cut. Links are (from, to), by names of processes."""

    def __init__(self, loop: SimulationLoop) -> None:
        self.loop = loop
        self.servers: dict[str, Server] = {}
        self.latency_s = 0.0002, 0.002
        self._cut: dict[tuple[str, str], float] = {}
        self._connections: list[Connection] = []

    def server(self, **options: Any) -> "Server":
        return Server(self, options.get("interceptors", ()))

    def channel(self, address: str, options: Any = ()) -> "Channel":
        return Channel(self, address)

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from one to the other."""
        self._cut.setdefault((source, target), self.loop.time())
        self.loop.call_later(KEEPALIVE_S, self._break_silent)

    def mend(self) -> None:
        """Everything gets through again."""
        self._cut.clear()
        for connection in self._connections:
            connection.flush()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cut

    def delay_s(self) -> float:
        low, high = self.latency_s
        return self.loop.random.uniform(low, high)

    def add(self, connection: "Connection") -> None:
        self._connections.append(connection)

    def forget(self, connection: "Connection") -> None:
        if connection in self._connections:
            self._connections.remove(connection)

    def died(self, process: Process) -> None:
        """Its connections are reset."""
        for address in [address for address, server in self.servers.items() if server.process is process]:
            del self.servers[address]
        for connection in list(self._connections):
            if process in (connection.client, connection.served):
                connection.end("connection reset by peer")

    def _break_silent(self) -> None:
        silent = self.loop.time() - KEEPALIVE_S + 1e-6
        for connection in list(self._connections):
            ends = _name(connection.client), _name(connection.served)
            since = [self._cut[link] for link in (ends, ends[::-1]) if link in self._cut]
            if since and min(since) <= silent:
                connection.end("keepalive watchdog timeout")


def _name(process: Process | None) -> str:
    return process.name if process is not None else "test"


class Server:
    """As grpc.aio.server gives it."""

    def __init__(self, network: Network, interceptors: Any) -> None:
        self.process = CURRENT.get()
        self._network = network
        self._interceptors = list(interceptors)
        self._generic: list[Any] = []
        self._address = ""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self._generic += handlers

    def add_registered_method_handlers(self, name: str, handlers: Any) -> None:
        """The same ones again."""

    def add_insecure_port(self, address: str) -> int:
        host, _, text = address.rpartition(":")
        port = int(text) or self._network.loop.new_port()
        self._address = f"{host}:{port}"
        if self._address in self._network.servers:
            raise RuntimeError("the address is in use")
        return port

    async def start(self) -> None:
        self._network.servers[self._address] = self

    async def stop(self, grace: float | None) -> None:
        self._network.servers.pop(self._address, None)
        if self.process is not None:
            self._network.died(self.process)

    async def handler(self, method: str) -> Any:
        """As the interceptors have it; None where there is none."""
        details = _Details(method)

        async def find(details: Any) -> Any:
            for generic in self._generic:
                if (handler := generic.service(details)) is not None:
                    return handler
            return None

        if not self._interceptors:
            return await find(details)
        return await self._interceptors[0].intercept_service(find, details)


class _Details:
    invocation_metadata = ()

    def __init__(self, method: str) -> None:
        self.method = method


class Connection:
    """Between a channel's process and a server's."""

    def __init__(self, network: Network, server: Server) -> None:
        self.client, self.served, self.server = CURRENT.get(), server.process, server
        self.open = True
        self.calls: dict[_Call, None] = {}
        self._network = network
        self._next = [0.0, 0.0]
        self._held: list[list[Callable[[], None]]] = [[], []]
        network.add(self)

    def to_server(self, arrive: Callable[[], None]) -> None:
        self._send(0, self.client, self.served, arrive)

    def to_client(self, arrive: Callable[[], None]) -> None:
        self._send(1, self.served, self.client, arrive)

    def _send(self, way: int, source: Process | None, target: Process | None, arrive: Callable[[], None]) -> None:
        if not self.open or (source is not None and not source.alive):
            return
        if self._held[way] or self._network.is_cut(_name(source), _name(target)):
            self._held[way].append(arrive)
            return
        loop = self._network.loop
        self._next[way] = max(self._next[way] + 1e-7, loop.time() + self._network.delay_s())
        loop.call_at(self._next[way], self._arrive, target, arrive)

    def _arrive(self, target: Process | None, arrive: Callable[[], None]) -> None:
        if self.open and (target is None or target.alive):
            in_process(target, arrive)

    def flush(self) -> None:
        """What was held back, now that the link is whole."""
        for way, ends in enumerate(((self.client, self.served), (self.served, self.client))):
            held, self._held[way] = self._held[way], []
            for arrive in held:
                self._send(way, *ends, arrive)

    def end(self, why: str) -> None:
        """Both sides hear of it, as far as they live."""
        if self.open:
            self.open = False
            self._network.forget(self)
            for call in list(self.calls):
                call.cut_off(why)


class Channel:
    """As grpc.aio.insecure_channel gives it."""

    def __init__(self, network: Network, address: str) -> None:
        self._network, self._address = network, address
        self._connection: Connection | None = None
        self._calls: dict[_Call, None] = {}
        self._closed = False

    async def channel_ready(self) -> None:
        while True:
            try:
                await self.connect()
                return
            except ConnectionError:
                await asyncio.sleep(0.1)

    async def connect(self) -> Connection:
        """Raises ConnectionError where nobody listens, or nothing gets through."""
        if self._connection is not None and self._connection.open:
            return self._connection
        server, me = self._network.servers.get(self._address), _name(CURRENT.get())
        await asyncio.sleep(self._network.delay_s())
        if server is None:
            raise ConnectionRefusedError("connection refused")
        there = _name(server.process)
        if self._network.is_cut(me, there) or self._network.is_cut(there, me):
            await asyncio.sleep(_CONNECT_S)
            raise ConnectionError("connection timed out")
        if self._network.servers.get(self._address) is not server:
            raise ConnectionRefusedError("connection refused")
        if self._connection is None or not self._connection.open:
            self._connection = Connection(self._network, server)
        return self._connection

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        for call in list(self._calls):
            call.cancel()
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

    def stream_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        return self._multi(method, request_serializer, response_deserializer, _UnaryCall)

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        return self._multi(method, request_serializer, response_deserializer, _StreamCall)

    def _multi(self, method: str, serialize: Any, deserialize: Any, kind: "type[_Call]") -> Any:
        def call(request: Any = None, timeout: float | None = None, **_: Any) -> _Call:
            made = kind(self, self._network.loop, method, serialize, deserialize)
            self._calls[made] = None
            made.ended.add_done_callback(lambda _: self._calls.pop(made, None))
            made.begin(request, timeout)
            return made

        return call


class _Call:
    """The client's side of a call."""

    def __init__(self, channel: Channel, loop: SimulationLoop, method: str, serialize: Any, deserialize: Any) -> None:
        self._channel, self._loop, self._method = channel, loop, method
        self._serialize, self._deserialize = serialize or bytes, deserialize or bytes
        self.ended: asyncio.Future[grpc.aio.AioRpcError | None] = loop.create_future()
        """None, or what it ended with."""
        self._answers: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._side: _ServerSide | None = None
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
        side = self._side = _ServerSide(self, connection, self._method)
        connection.to_server(side.begin)
        if not self._connected.done():
            self._connected.set_result(None)
        if inspect.isasyncgen(request) or hasattr(request, "__aiter__"):
            async for each in request:
                await self.write(each)
            await self.done_writing()
        elif request is not None:
            await self.write(request)
            await self.done_writing()

    async def write(self, request: Any) -> None:
        if not self._connected.done():
            waited: set[asyncio.Future[Any]] = {self._connected, self.ended}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if self.ended.done():
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


class _Requests:
    """What a handler reads."""

    def __init__(self, queue: "asyncio.Queue[bytes | None]", deserialize: Callable[[bytes], Any]) -> None:
        self._queue, self._deserialize = queue, deserialize

    def __aiter__(self) -> "_Requests":
        return self

    async def __anext__(self) -> Any:
        data = await self._queue.get()
        if data is None:
            self._queue.put_nowait(None)
            raise StopAsyncIteration
        return self._deserialize(data)


class _ServerSide:
    """The handler's side of a call, in its process."""

    def __init__(self, call: _Call, connection: Connection, method: str) -> None:
        self.requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._call, self._connection, self._method = call, connection, method
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            handler = await self._connection.server.handler(self._method)
            if handler is None:
                self._end(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
                return
            await self._serve(handler)
            self._end(grpc.StatusCode.OK, "")
        except _Aborted as aborted:
            self._end(aborted.code, aborted.details)
        except asyncio.CancelledError:
            self._end(grpc.StatusCode.CANCELLED, "the handler was cancelled")
            raise
        except Exception as error:
            self._end(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")

    async def _serve(self, handler: Any) -> None:
        serialize, deserialize = handler.response_serializer or bytes, handler.request_deserializer or bytes
        request: Any = _Requests(self.requests, deserialize)
        if not handler.request_streaming:
            request = await request.__anext__()
        sides = handler.request_streaming, handler.response_streaming
        kind = "_".join("stream" if streams else "unary" for streams in sides)
        answer = getattr(handler, kind)(request, _Context())
        if not handler.response_streaming:
            self._tell(serialize(await answer))
            return
        async for each in answer:
            self._tell(serialize(each))

    def _tell(self, data: bytes) -> None:
        self._connection.to_client(lambda: self._call.answer(data))

    def _end(self, code: grpc.StatusCode, details: str) -> None:
        self._connection.to_client(lambda: self._call.finish(code, details))


class _Aborted(grpc.aio.AbortError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class _Context:
    """What handlers get."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise _Aborted(code, details)
