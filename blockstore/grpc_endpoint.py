"""Servers and channels, made the same way in every process.

Each server has the standard health service and reflection; each message has an explicit limit, so
that a length is bounded before a byte of it is allocated. Connections are probed: a half-open one
is found within keepalive time and timeout, not when TCP gives up.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from blockstore.config import join_address, split_address
from blockstore.errors import Conflict
from blockstore.grpc_errors import ErrorInterceptor
from blockstore.units import MIB

#: gRPC's own limit; no message of ours comes near it (a batch has at most 1 MiB of payload).
MAX_MESSAGE_SIZE: Final = 4 * MIB
#: Calls that one connection may have open: a front-end has two streams for each replica.
MAX_CONCURRENT_STREAMS: Final = 10_000

_SHARED: Final = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_SIZE),
    ("grpc.max_send_message_length", MAX_MESSAGE_SIZE),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Both sides: a server without it takes pings of an idle connection for an attack, and ends it.
    ("grpc.keepalive_permit_without_calls", 1),
]
_SERVER: Final = [
    *_SHARED,
    ("grpc.so_reuseport", 0),  # two processes never share an address
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    ("grpc.http2.max_ping_strikes", 0),  # both sides probe, and an idle peer is no attacker
]
_CLIENT: Final = [
    *_SHARED,
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The least time that an attempt to connect is given; a busy host takes more than 100 ms at times.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


class Endpoint:
    """A gRPC server on one address; `address` is what others dial, with the port that it got."""

    def __init__(self, listen: str, advertise: str = "") -> None:
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_SERVER)
        self._listen = listen
        self._advertise = advertise
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._names: list[str] = []
        self.address = ""

    def add_names(self, names: Iterable[str]) -> None:
        """The full names of the services that were registered on `server`, for health and reflection."""
        self._names += names

    def add_service(
        self, name: str, add_generated: Callable[[Any, Any], None], service: Any, by_hand: Mapping[str, Any]
    ) -> None:
        """Serve `service`, as add_generated does but for the calls in by_hand: their handlers, by name.

        name: the service's full name, for health and reflection too.
        """
        generated = _Generated()
        add_generated(service, generated)
        handlers = {**generated.handlers, **by_hand}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self.add_names([name])

    async def start(self) -> None:
        """Listen and serve. Raises Conflict where the address cannot be had."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        reflection.enable_server_reflection(
            (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.server
        )  # fmt: skip
        try:
            port = self.server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise Conflict(
                f"cannot listen on {self._listen}: {error}; choose another port, or 0 for a free one"
            ) from error
        host, _ = split_address(self._listen)
        self.address = self._advertise or join_address(host, port)
        await self.server.start()
        for name in ("", *self._names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float) -> None:
        """Tell health watchers, let calls end for `grace_s` seconds, then cut them off."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


class _Generated:
    """Stands where a server does, and keeps what the generated code registers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same ones again, wrapped."""

    def add_registered_method_handlers(self, name: str, handlers: dict[str, Any]) -> None:
        self.handlers.update(handlers)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to HOST:PORT; it connects when the first call is made, and again when it breaks."""
    options: list[tuple[str, Any]] = list(_CLIENT)
    return grpc.aio.insecure_channel(address, options=options)


def open_blocking_channel(address: str) -> grpc.Channel:
    """The same for code without an event loop."""
    options: list[tuple[str, Any]] = list(_CLIENT)
    return grpc.insecure_channel(address, options=options)
