"""Servers as grpc.aio has them, over the simulated network: handlers get requests as bytes, and answer with bytes."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import grpc

from tests.cluster_simulation.network import Connection, Network
from tests.cluster_simulation.processes import CURRENT


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


class ServerSide:
    """The handler's side of a call, in its process."""

    def __init__(self, call: Any, connection: Connection, method: str) -> None:
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
        answer = getattr(handler, kind)(request, _Context(lambda each: self._tell(serialize(each))))
        if not handler.response_streaming:
            self._tell(serialize(await answer))
        elif inspect.isawaitable(answer):  # it writes to its context
            await answer
        else:
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
    """What handlers get. tell: sends an answer."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self._tell = tell

    async def write(self, message: Any) -> None:
        self._tell(message)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        raise _Aborted(code, details)
