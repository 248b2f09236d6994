"""Servers and channels, made the same way in every process.

Each server has the standard health service and reflection; each message has an explicit limit, so
that a length is bounded before a byte of it is allocated. Connections are probed: a half-open one
is found within 5 s, not when TCP gives up. A channel to several control processes
watches the health of all, and calls the one that says it is active.
"""

import json
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from blockstore.config import join_address, split_address, split_addresses
from blockstore.errors import Conflict, QuorumUnavailable
from blockstore.grpc_errors import ErrorInterceptor
from blockstore.grpc_reflection_later import ReflectionLater
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
    # gRPC 1.85 gives no connection up for keepalive_timeout (its pull request 39239), only for this: 60 s by default.
    # Not at servers: a blocking client without a call under way answers no ping.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The least time that an attempt to connect is given; a busy host takes more than 100 ms at times.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
#: The health of this service says which control is the active one.
CONTROL_SERVICE: Final = "cairn.v1.Control"
#: Source: gRPC, "Client-side health checking" (proposal A17).
_TO_THE_ACTIVE_ONE: Final = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": CONTROL_SERVICE},
}
_SEVERAL_CONTROLS: Final = [
    ("grpc.service_config", json.dumps(_TO_THE_ACTIVE_ONE)),
]


class Endpoint:
    """A gRPC server on one address; `address` is what others dial, with the port that it got."""

    def __init__(self, listen: str, advertise: str = "") -> None:
        self.server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_SERVER)
        self._listen = listen
        self._advertise = advertise
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._serving: dict[str, bool] = {}
        self._started = False
        self.address = ""

    def add_names(self, names: Iterable[str]) -> None:
        """The full names of the services that were registered on `server`, for health and reflection."""
        self._serving.update(dict.fromkeys(names, True))

    async def set_serving(self, name: str, serving: bool) -> None:
        """Whether that service is at work, for whoever watches its health. Also before `start`."""
        self._serving[name] = serving
        if self._started:
            await self._tell_health(name)

    def add_service(
        self, name: str, add_generated: Callable[[Any, Any], None], service: Any, by_hand: Mapping[str, Any]
    ) -> None:
        """Serve `service`, as add_generated does but for the calls in by_hand: their handlers, by name.

        name: the service's full name, for health and reflection too.
        """
        handlers = {**handlers_of(add_generated, service), **by_hand}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self.add_names([name])

    async def start(self) -> None:
        """Listen and serve. Raises Conflict where the address cannot be had."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        shown = (*self._serving, health.SERVICE_NAME)
        self.server.add_generic_rpc_handlers((ReflectionLater(shown, handlers_of),))
        try:
            port = self.server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise Conflict(
                f"cannot listen on {self._listen}: {error}; choose another port, or 0 for a free one"
            ) from error
        host, _ = split_address(self._listen)
        self.address = self._advertise or join_address(host, port)
        await self.server.start()
        self._started = True
        for name in ("", *self._serving):
            await self._tell_health(name)

    async def stop(self, grace_s: float) -> None:
        """Tell health watchers, let calls end for `grace_s` seconds, then cut them off."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)

    async def _tell_health(self, name: str) -> None:
        statuses = health_pb2.HealthCheckResponse
        await self._health.set(name, statuses.SERVING if self._serving.get(name, True) else statuses.NOT_SERVING)


def handlers_of(add_generated: Callable[[Any, Any], None], service: Any) -> dict[str, Any]:
    """The handlers of a service's calls, by the calls' names. add_generated: its generated add_..._to_server."""
    generated = _Generated()
    add_generated(service, generated)
    return generated.handlers


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


def open_control_channel(addresses: str) -> grpc.aio.Channel:
    """A channel to control at HOST:PORT, or to the active one of several, with commas between them.

    Of several, a call goes to whichever says that it is active when the call is made; while none does, it ends as
    UNAVAILABLE. Raises InvalidRequest, and QuorumUnavailable where a host's name is not known.
    """
    return grpc.aio.insecure_channel(*control_target(addresses))


def control_target(addresses: str) -> tuple[str, list[tuple[str, Any]]]:
    """The same as what gRPC's channels are made of: a target and options."""
    several = split_addresses(addresses)
    if len(several) == 1:
        return several[0], list(_CLIENT)
    return _target_of(several), [*_CLIENT, *_SEVERAL_CONTROLS]


def _target_of(addresses: Sequence[str]) -> str:
    """All of them as one target: gRPC takes several only as numbers, and only of one family."""
    found = []
    for each in addresses:
        host, port = split_address(each)
        try:
            family, *_, numbers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise QuorumUnavailable(f"the host of {each} is not known: {error.strerror}") from error
        found.append((family, str(numbers[0]), port))
    if all(family is socket.AF_INET for family, _, _ in found):
        return "ipv4:" + ",".join(f"{host}:{port}" for _, host, port in found)
    mapped = ((host if family is socket.AF_INET6 else f"::ffff:{host}", port) for family, host, port in found)
    return "ipv6:" + ",".join(f"[{host}]:{port}" for host, port in mapped)


def open_blocking_channel(address: str) -> grpc.Channel:
    """The same for code without an event loop."""
    options: list[tuple[str, Any]] = list(_CLIENT)
    return grpc.insecure_channel(address, options=options)
