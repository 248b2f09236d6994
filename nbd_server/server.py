"""The NBD server: listening sockets, and the connections of all clients.

    server = NbdServer(exports)
    await server.listen_tcp("127.0.0.1", 10809)
    ...
    await server.close()

One event loop runs all of it. Adding an export is `exports.add`; taking one out is `remove_export`,
which also ends the connections that have it.
"""

import asyncio
import errno
import socket
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from nbd_server.budget import Budget, Client
from nbd_server.command_counts import CommandDurations
from nbd_server.connection import Connection
from nbd_server.exports import Export, Exports
from nbd_server.limits import Limits
from nbd_server.phases import Phase
from nbd_server.security import Port, Security

_log = structlog.get_logger(__name__)
_BACKLOG: Final = 128
#: Four calls of stat(2) each time.
_LOOK_AT_FILES_S: Final = 1.0
_BEFORE_AN_EXPORT: Final = (Phase.HANDSHAKE, Phase.STARTING_TLS)
#: A client whose machine is gone says nothing: the kernel asks after a minute, and gives up after another.
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


Listening = tuple[str, int] | Path
"""Where clients connect: host and port, or a unix socket."""


class NbdServer:
    """Serves `exports` to any number of clients. Use it inside the event loop that runs the devices."""

    def __init__(self, exports: Exports, limits: Limits | None = None, security: Security | None = None) -> None:
        """security: what is asked of clients; None: nothing."""
        self.exports = exports
        self.durations = CommandDurations()
        self._security = security
        self._look_timer: asyncio.TimerHandle | None = None
        self._budget = Budget(limits or Limits())
        self._stall_timer: asyncio.TimerHandle | None = None
        self._listeners: list[asyncio.Server] = []
        self._unix_paths: list[Path] = []
        self._closing = False
        self._clients: dict[str, Client] = {}
        """By their addresses."""
        self._connections: dict[Connection, None] = {}
        """In the order in which they were opened."""

    async def listen_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen at `host` and `port` (0: a free one); returns where. Raises OSError."""
        loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = (await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM))[0][4]
        return await self._listen_tcp_on(_bound_socket(family, address))

    async def listen_on(self, listening: socket.socket) -> "Listening":
        """Listen at a socket that was made by somebody else, whose path stays; returns where. Raises OSError."""
        if listening.family != socket.AF_UNIX:
            _set_tcp_options(listening)
            return await self._listen_tcp_on(listening)
        accept = partial(self._accept, self._security.unix if self._security else Port())
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_unix_server(accept, sock=listening, backlog=_BACKLOG))
        return Path(listening.getsockname())

    async def _listen_tcp_on(self, listening: socket.socket) -> tuple[str, int]:
        accept = partial(self._accept, self._security.tcp if self._security else Port())
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_server(accept, sock=listening, backlog=_BACKLOG))
        bound = listening.getsockname()
        return str(bound[0]), int(bound[1])

    async def listen_unix(self, path: Path) -> None:
        """Listen at a unix socket; one that a process before left there is replaced. Raises OSError."""
        if await _somebody_listens(path):
            raise OSError(errno.EADDRINUSE, f"another process listens at {path}")
        loop = asyncio.get_running_loop()
        accept = partial(self._accept, self._security.unix if self._security else Port())
        self._listeners.append(await loop.create_unix_server(accept, str(path), backlog=_BACKLOG))
        self._unix_paths.append(path)

    async def remove_export(self, name: str) -> Export:
        """Take an export out, and end its connections once what they have in flight is answered.

        It takes `drain_s` at most. Raises NotFound.
        """
        export = self.exports.remove(name)
        await self.end_connections(export)
        return export

    async def end_connections(self, export: Export) -> None:
        """End the connections that have `export`, once what they have in flight is answered, and by `drain_s`."""
        await self._drain([connection for connection in self._connections if connection.export is export])

    def reload(self, *, even_if_unchanged: bool = True) -> None:
        """Read certificates and rules anew; clients that may not do any more what they do are disconnected."""
        if self._security is not None and self._security.refresh(even_if_unchanged=even_if_unchanged):
            for connection in list(self._connections):
                connection.drain_if_forbidden()

    def watch_files(self) -> None:
        """Do so by itself from now on, soon after one of the files has changed."""
        self.reload(even_if_unchanged=False)
        self._look_timer = asyncio.get_running_loop().call_later(_LOOK_AT_FILES_S, self.watch_files)

    async def close(self) -> None:
        """Stop listening, and end all connections once what they have in flight is answered.

        What clients ask for meanwhile is answered with ESHUTDOWN. It takes `drain_s` at most.
        """
        self._closing = True
        for listener in self._listeners:
            listener.close()
        for path in self._unix_paths:  # at once: whoever starts next may put its own there
            path.unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.shut_down()
        if self._connections:
            await self._until_ended(self._connections)
        for timer in (self._stall_timer, self._look_timer):
            if timer is not None:
                timer.cancel()

    def clients_of(self, exports: Collection[Export]) -> int:
        """How many have one of these; with those gone whose requests have not ended."""
        return sum(any(connection.export is each for each in exports) for connection in self._connections)

    @property
    def connection_count(self) -> int:
        """Clients connected, and those gone whose requests have not ended."""
        return len(self._connections)

    @property
    def in_flight_requests(self) -> int:
        """Of all connections."""
        return sum(connection.in_flight_requests for connection in self._connections)

    @property
    def in_flight_bytes(self) -> int:
        """Of all connections: payloads of writes and results of reads; see Limits.total_bytes."""
        return self._budget.used_bytes

    @property
    def in_flight_limit_bytes(self) -> int:
        """The most that those may be."""
        return self._budget.limits.total_bytes

    @property
    def waiting_connections(self) -> int:
        """That wait for memory which others hold."""
        return self._budget.waiting_count

    def opened(self, connection: Connection) -> None:
        """A client has connected: beyond the limit somebody has to give way."""
        self._connections[connection] = None
        if self._closing:
            connection.abort()
            return
        self._join_client(connection)
        if self._stall_timer is None:
            self._look_for_stalls_later()
        limits = self._budget.limits
        if connection.share.client.connections > limits.connections_per_client:
            _give_way(each for each in self._connections if each.address == connection.address)
        elif len(self._connections) > limits.connections:
            _give_way(self._connections)

    def _join_client(self, connection: Connection) -> None:
        """Those of one address share what a client may have; each that came by a unix socket is one by itself."""
        if connection.address:
            connection.share.client = self._clients.setdefault(connection.address, connection.share.client)
        connection.share.client.connections += 1

    def chosen(self, connection: Connection) -> None:
        """A client has chosen its export: where it is a link, its client's links of other sets end (links.py)."""
        others = [each for each in self._connections if each is not connection and _are_of_one_client(each, connection)]
        sets = (each.link_set for each in others if each.link_set.takes(connection.link_set.name))
        connection.link_set = next(sets, connection.link_set)
        for other in others:
            if other.link_set is not connection.link_set:
                other.link_set.ended = True
                other.drain()

    def given_up(self, connection: Connection) -> None:
        """Its set of links has ended: none of them begins anything any more."""
        _log.info("a client's links end: it moves its requests between them", client=connection.client)
        for each in [each for each in self._connections if each.link_set is connection.link_set]:
            each.drain()

    def closed(self, connection: Connection) -> None:
        """A client is gone, and nothing of it is in flight."""
        del self._connections[connection]
        client = connection.share.client
        client.connections -= 1
        if not client.connections:
            self._clients.pop(connection.address, None)
        connection.ended.set_result(None)

    def _accept(self, port: Port) -> Connection:
        return Connection(self, self.exports, self._budget, port)

    def _look_for_stalls_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._stall_timer = loop.call_later(self._budget.limits.stalled_s, self._look_for_stalls)

    def _look_for_stalls(self) -> None:
        for connection in list(self._connections):
            connection.drop_if_stalled()
        self._look_for_stalls_later()

    async def _drain(self, connections: list[Connection]) -> None:
        for connection in connections:
            connection.drain()
        if connections:
            await self._until_ended(connections)

    async def _until_ended(self, connections: Iterable[Connection]) -> None:
        """A request that has not ended by the limit has no client any more: its volume's end is its own."""
        limit_s = self._budget.limits.drain_s + self._budget.limits.farewell_s
        await asyncio.wait([connection.ended for connection in connections], timeout=limit_s)


def _are_of_one_client(one: Connection, other: Connection) -> bool:
    """Whether both are links of one client to one device, under whichever name."""
    if not one.client or one.export is None or other.export is None:
        return False
    return one.client == other.client and one.export.device is other.export.device


def _give_way(connections: Iterable[Connection]) -> None:
    """The oldest that is still in its handshake goes: the newcomer, where no other is."""
    next(each for each in connections if each.phase in _BEFORE_AN_EXPORT).abort()


def _bound_socket(family: socket.AddressFamily, address: Any) -> socket.socket:
    """A TCP socket at `address`, with what the connections that it accepts inherit from it. Raises OSError."""
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _set_tcp_options(listening)
        listening.bind(address)
    except OSError:
        listening.close()
        raise
    return listening


def _set_tcp_options(listening: socket.socket) -> None:
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, value in _KEEPALIVE:
        listening.setsockopt(socket.IPPROTO_TCP, option, value)


async def _somebody_listens(path: Path) -> bool:
    """Whether a process answers at that unix socket; false also where there is none."""
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    writer.close()
    return True
