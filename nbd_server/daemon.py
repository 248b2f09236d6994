"""The front-end's process: the NBD server, the FrontEnd service, and word to control."""

import asyncio
import dataclasses
import signal
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Final

import structlog

from blockstore.config import FrontEndSettings, ShortCircuitMode, Tls, join_address, split_address
from blockstore.daemon import stop_signals, tell_ready, write_address
from blockstore.durable_files import make_directory
from blockstore.errors import Conflict
from blockstore.grpc_endpoint import Endpoint
from blockstore.metrics import Sample
from blockstore.metrics_endpoint import serving_metrics
from blockstore.rpc import control_pb2, control_pb2_grpc
from blockstore.systemd import listening_sockets
from nbd_server.crash import reporting_crashes
from nbd_server.exports import Exports
from nbd_server.front_end import FrontEnd
from nbd_server.limits import limits_of
from nbd_server.metrics import METRICS, samples
from nbd_server.security import Security
from nbd_server.server import Listening, NbdServer
from nbd_server.uri import NbdTarget, make_uri

_log = structlog.get_logger(__name__)
_GRACE_S: Final = 1.0
#: NBD's doc/uri.md: nbds is TLS, without a way back. What is best comes first.
_SCHEMES: Final = {Tls.NONE: ("nbd",), Tls.OFFER: ("nbds", "nbd"), Tls.REQUIRE: ("nbds",)}


async def run(settings: FrontEndSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns 0. Raises Conflict where an address is in use.

    Raises Fenced where another process runs with this front-end's id.
    """
    stopped = stop_signals()
    async with AsyncExitStack() as stack:
        return await _serve(settings, stopped, stack)


async def _serve(settings: FrontEndSettings, stopped: "asyncio.Future[int]", stack: AsyncExitStack) -> int:
    server = NbdServer(Exports(), limits_of(settings), security=Security(settings))
    server.watch_files()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload)
    make_directory(settings.state)
    never = ShortCircuitMode.NEVER
    if settings.short_circuit is not never and not stack.enter_context(reporting_crashes(settings.state)):
        settings = dataclasses.replace(settings, short_circuit=never)
    front_end = FrontEnd(settings, server)
    endpoint = Endpoint(settings.listen, settings.advertise)
    control_pb2_grpc.add_FrontEndServicer_to_server(front_end, endpoint.server)
    endpoint.add_names([control_pb2.DESCRIPTOR.services_by_name["FrontEnd"].full_name])
    await stack.enter_async_context(_serving_metrics(settings, server, front_end))
    await _listen(server, settings, front_end)
    await endpoint.start()
    front_end.address = endpoint.address
    write_address(settings.state / "address", endpoint.address)
    tell_ready(f"{front_end.id} serves at {' '.join(front_end.uris)}")
    _log.info("front-end serves", front_end=front_end.id, address=endpoint.address, uris=front_end.uris)
    control = asyncio.create_task(front_end.run())
    ends: list[asyncio.Future[Any]] = [stopped, control]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        control.cancel()
        ended = await asyncio.gather(control, return_exceptions=True)
        front_end.end_holds()
        await server.close()  # while the volumes are there, for what is in flight
        await front_end.close()
        await front_end.end()
        await endpoint.stop(_GRACE_S)
    if not stopped.done() and isinstance(ended[0], Exception):
        raise ended[0]
    return 0


def _serving_metrics(
    settings: FrontEndSettings, server: NbdServer, front_end: FrontEnd
) -> AbstractAsyncContextManager[str]:
    async def collect() -> list[Sample]:
        return samples(server, front_end)

    return serving_metrics(settings.metrics, settings.state, METRICS, collect)


def _advertised(address: str, port: int) -> str:
    """Where NBD clients connect, if that is not where it listens; empty where it is. port: that is listened at."""
    if not address:
        return ""
    host, given = split_address(address)
    return join_address(host, given or port)


async def _listen(server: NbdServer, settings: FrontEndSettings, front_end: FrontEnd) -> None:
    """At the sockets that systemd passed; at those of the settings where it passed none."""
    passed = listening_sockets()
    try:
        if passed:
            sockets = [await server.listen_on(each) for each in passed]
        else:
            sockets = await _listen_as_set(server, settings)
    except OSError as error:
        raise Conflict(
            f"cannot listen for NBD clients: {error}; choose another --nbd-listen or --nbd-socket"
        ) from error
    addresses = [each for each in sockets if isinstance(each, tuple)]
    for host, port in addresses[:1]:
        write_address(settings.state / "nbd_address", join_address(host, port))
    where = [_advertised(settings.nbd_advertise, port) or join_address(host, port) for host, port in addresses]
    front_end.uris = [f"{scheme}://{each}" for each in where for scheme in _SCHEMES[settings.tls]]
    paths = [str(each.absolute()) for each in sockets if isinstance(each, Path)]
    front_end.uris += [make_uri(NbdTarget("", socket_path=path)) for path in paths]


async def _listen_as_set(server: NbdServer, settings: FrontEndSettings) -> list[Listening]:
    sockets: list[Listening] = [await server.listen_tcp(*split_address(settings.nbd_listen))]
    if settings.nbd_socket is not None:
        settings.nbd_socket.parent.mkdir(parents=True, exist_ok=True)
        await server.listen_unix(settings.nbd_socket)
        sockets.append(settings.nbd_socket)
    return sockets
