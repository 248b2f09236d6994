"""Links to a front-end, made in user space: connected, agreed upon, and ready to be handed to the kernel."""

import asyncio
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from blockstore.errors import Conflict, NotFound, QuorumUnavailable
from nbd_server.kernel.negotiation import Agreed, Negotiation, Refused
from nbd_server.links import link_name
from nbd_server.uri import NbdTarget
from nbd_server.wire import Option, OptionReply, ProtocolError

_CHUNK: Final = 4096
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


async def open_link(target: NbdTarget, client: str, timeout_s: float) -> Link:
    """A link of `client` to the export; from here on its older links to it are over.

    Raises NotFound where the front-end does not serve the export (yet, or any more), Conflict where it serves it to
    somebody else, and QuorumUnavailable where nothing answers in time.
    """
    async with _negotiated(target, client, Option.GO, timeout_s) as (connection, agreed):
        kept = connection.dup()
    kept.setblocking(True)
    return Link(kept, agreed)


async def probe(target: NbdTarget, client: str, timeout_s: float) -> Agreed:
    """What the front-end says of the export now. Raises what open_link does; ends no link."""
    async with _negotiated(target, client, Option.INFO, timeout_s) as (_, agreed):
        return agreed


@asynccontextmanager
async def _negotiated(
    target: NbdTarget, client: str, option: Option, timeout_s: float
) -> AsyncIterator[tuple[socket.socket, Agreed]]:
    """The connection is closed behind it; whoever keeps it has to dup() it."""
    name = target.socket_path or f"{target.host}:{target.port}"
    try:
        async with asyncio.timeout(timeout_s):
            with await _connect(target) as connection:
                agreed = await _negotiate(connection, Negotiation(link_name(target.export, client), option))
                yield connection, agreed
    except Refused as error:
        kind = Conflict if error.reply == OptionReply.ERR_POLICY else NotFound
        raise kind(f"the front-end at {name} does not serve {target.export} to {client}: {error}") from error
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


async def _negotiate(connection: socket.socket, negotiation: Negotiation) -> Agreed:
    loop = asyncio.get_running_loop()
    while negotiation.agreed is None:
        data = await loop.sock_recv(connection, _CHUNK)
        if not data:
            raise EOFError("the connection ended in the handshake")
        negotiation.receive_data(data)
        if answer := negotiation.data_to_send():
            await loop.sock_sendall(connection, answer)
    return negotiation.agreed
