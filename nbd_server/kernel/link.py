"""Links to a front-end, made in user space: connected, agreed upon, and ready to be handed to the kernel."""

import asyncio
import os
import secrets
import select
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blockstore.errors import Conflict, InvalidRequest, NotFound, QuorumUnavailable
from nbd_server.kernel import kernel_tls
from nbd_server.kernel.negotiation import Agreed, Negotiation, Refused
from nbd_server.links import link_name
from nbd_server.uri import NbdTarget
from nbd_server.wire import Option, OptionReply, ProtocolError

_CHUNK: Final = 4096
#: Of a set's name, so that no two are the same.
_SET_BYTES: Final = 8
#: A machine that is gone says nothing: TCP asks after 5 s of silence, and gives up on what it sent after 10 s.
_TCP_OPTIONS: Final = (
    (socket.TCP_NODELAY, 1),
    (socket.TCP_KEEPIDLE, 5),
    (socket.TCP_KEEPINTVL, 2),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 10_000),
)


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A connection in the transmission phase. Whoever holds `socket` may cut it, also after the kernel has it."""

    socket: socket.socket
    agreed: Agreed

    def cut(self) -> None:
        """End the connection, whoever else has the socket; it may have ended already."""
        with suppress(OSError):  # it is not connected any more
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def is_dead(self) -> bool:
        """Whether the front-end or the kernel has ended it."""
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return bool(poll.poll(0))


async def open_links(
    target: NbdTarget, client: str, count: int, timeout_s: float, certificates: Path | None = None
) -> tuple[Link, ...]:
    """As many links of a new set; of one, where it is alone, see open_link, whose errors this has, too."""
    link_set = secrets.token_hex(_SET_BYTES) if count > 1 else ""
    links: list[Link] = []
    try:
        while len(links) < count:
            links.append(await open_link(target, client, timeout_s, certificates, link_set))
    except BaseException:
        for link in links:
            link.cut()
        raise
    return tuple(links)


async def open_link(
    target: NbdTarget, client: str, timeout_s: float, certificates: Path | None = None, link_set: str = ""
) -> Link:
    """A link of `client` to the export; from here on its older links to it that are not of the same set are over.

    certificates: a client's directory, for a target with TLS. Raises NotFound where the front-end does not serve the
    export (yet, or any more), Conflict where it serves it to somebody else or the kernel cannot take it,
    QuorumUnavailable where nothing answers in time or one does not trust the other, and InvalidRequest for certificates
    that cannot be used.
    """
    name = link_name(target.export, client, link_set)
    async with _negotiated(target, name, Option.GO, timeout_s, certificates) as (connection, agreed):
        if isinstance(connection, ssl.SSLSocket):
            kernel_tls.check_offloaded(connection)
        kept = socket.socket(fileno=os.dup(connection.fileno()))
    kept.setblocking(True)
    return Link(kept, agreed)


async def probe(target: NbdTarget, client: str, timeout_s: float, certificates: Path | None = None) -> Agreed:
    """What the front-end says of the export now. Raises what open_link does; ends no link."""
    name = link_name(target.export, client)
    async with _negotiated(target, name, Option.INFO, timeout_s, certificates) as (_, agreed):
        return agreed


@asynccontextmanager
async def _negotiated(
    target: NbdTarget, asked: str, option: Option, timeout_s: float, certificates: Path | None
) -> AsyncIterator[tuple[socket.socket, Agreed]]:
    """asked: what the export is asked for as. The connection is closed behind it; whoever keeps it has to dup() it."""
    name = target.socket_path or f"{target.host}:{target.port}"
    try:
        async with asyncio.timeout(timeout_s):
            with ExitStack() as stack:
                connection = stack.enter_context(await _connect(target))
                negotiation = Negotiation(asked, option, tls=target.tls)
                await _negotiate(connection, negotiation)
                if negotiation.must_start_tls:
                    connection = stack.enter_context(await _start_tls(connection, target, certificates))
                    negotiation.tls_started()
                    await _negotiate(connection, negotiation)
                assert negotiation.agreed is not None
                yield connection, negotiation.agreed
    except Refused as error:
        kind = Conflict if error.reply == OptionReply.ERR_POLICY else NotFound
        raise kind(f"the front-end at {name} does not serve {asked}: {error}") from error
    except (OSError, EOFError, ProtocolError, TimeoutError) as error:
        why = str(error) or f"no answer in {timeout_s:g} s"
        raise QuorumUnavailable(f"the front-end at {name} cannot be used: {why}") from error


async def _connect(target: NbdTarget) -> socket.socket:
    loop = asyncio.get_running_loop()
    if target.socket_path:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: object = target.socket_path
    else:
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        connection, address = socket.socket(found[0][0], socket.SOCK_STREAM), found[0][4]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _TCP_OPTIONS:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setblocking(False)
    try:
        await loop.sock_connect(connection, address)  # type: ignore[arg-type]  # of whichever family
    except BaseException:
        connection.close()
        raise
    return connection


async def _start_tls(connection: socket.socket, target: NbdTarget, certificates: Path | None) -> ssl.SSLSocket:
    if certificates is None:
        raise InvalidRequest(f"the front-end at {target.host}:{target.port} has TLS: give --tls-certificates DIR")
    return await kernel_tls.start_tls(connection, certificates, target.host)


async def _negotiate(connection: socket.socket, negotiation: Negotiation) -> None:
    """Until it is agreed, or TLS is to be started."""
    while True:
        if answer := negotiation.data_to_send():
            await _send(connection, answer)
        if negotiation.agreed is not None or negotiation.must_start_tls:
            return
        data = await _receive(connection)
        if not data:
            raise EOFError("the connection ended in the handshake")
        negotiation.receive_data(data)


async def _receive(connection: socket.socket) -> bytes:
    if isinstance(connection, ssl.SSLSocket):
        return await kernel_tls.receive(connection, _CHUNK)
    return await asyncio.get_running_loop().sock_recv(connection, _CHUNK)


async def _send(connection: socket.socket, data: bytes) -> None:
    if isinstance(connection, ssl.SSLSocket):
        await kernel_tls.send(connection, data)
    else:
        await asyncio.get_running_loop().sock_sendall(connection, data)
