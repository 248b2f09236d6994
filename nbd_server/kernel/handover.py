"""Handing links to the kernel: the first ones with a device, later ones in place of those that are dead.

RECONFIGURE says nothing where no socket of the device is dead: it takes none, and succeeds. But a socket that the
kernel takes while the device has a timeout gets it as its send timeout, which shows on our own descriptor of the same
socket. A device with one link has no timeout, so it is given one together with the socket, and both are taken back
then. (While there is a timeout, an old socket that still seems alive dies of the next request that expires; so a hung
front-end's one is got rid of that way, too.) A device with several links keeps its timeout, `SLOW_S`.

Several links take the places behind a stand-in (`stand_in`). Places whose old sockets do not seem dead, as those of a
front-end that hangs may, stay as they are: what still goes there falls to the first link when its time is over, and
stays with it, so the links that were not taken are not offered later.

A new size is never told together with a socket: the kernel waits until no request is in flight before it takes a
size, and they may wait for that very socket.
Source: Linux, drivers/block/nbd.c, nbd_reconnect_socket, nbd_xmit_timeout and nbd_set_size.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import Final

from blockstore.errors import Conflict
from blockstore.units import BLOCK_SIZE
from nbd_server.kernel.devices import Host, Owner
from nbd_server.kernel.link import Link
from nbd_server.kernel.messages import Command, Request
from nbd_server.kernel.netlink import KernelNbd
from nbd_server.kernel.stand_in import StandIn

#: Of a device with several links: a request that is not answered within it ends its link, and is sent again over
#: another one. So it bounds how long requests wait that were in flight on a link that broke; but it has to be longer
#: than what all links hold takes at a slow front-end, or they would be ended again and again: of each 8 MiB that have
#: begun (nbd_server/limits.py), and what is in its socket. A node that is lost costs 0.1 s.
SLOW_S: Final = 10
#: Whole seconds are all that there is.
_MARK_S: Final = 1
_NO_TIMEOUT: Final = bytes(16)
"""A struct timeval of zeros: socket(7), SO_SNDTIMEO."""
#: The kernel learns that a socket is dead when it reads its end.
_DYING_S: Final = 1.0
_POLL_S: Final = 0.02


async def connect(
    nbd: KernelNbd, host: Host, links: Sequence[Link], owner: Owner, *, index: int | None, dead_timeout_s: int
) -> int:
    """Make a device of the links, of that index or a free one; its index. Raises what KernelNbd.ask does."""
    several = len(links) > 1
    with StandIn() as stand_in:
        stand_in.end()  # nothing is sent before the device is there
        sockets = [*([stand_in.socket] if several else []), *(each.socket for each in links)]
        given = await nbd.ask(
            Request(
                Command.CONNECT,
                index=index,
                sockets=[each.fileno() for each in sockets],
                size_bytes=links[0].agreed.size_bytes,
                block_size_bytes=BLOCK_SIZE,
                server_flags=links[0].agreed.flags,
                timeout_s=SLOW_S if several else 0,
                dead_timeout_s=dead_timeout_s,
                backend=owner.backend,
            )
        )
    assert given is not None, "the kernel answers a CONNECT with the device's index"
    if several:
        for link in links:
            _forget_timeout(link.socket)
    else:
        host.set_retry_interval(given)
    return given


async def replace(nbd: KernelNbd, host: Host, links: Sequence[Link], owner: Owner, index: int) -> tuple[Link, ...]:
    """Those of the links that the kernel took in place of dead ones; none while the old ones seem alive to it.

    Raises Conflict where the export is smaller than the device: that is another volume's content, or a defect.
    """
    check_size(host, index, min(each.agreed.size_bytes for each in links))
    if owner.connections > 1:
        return await _replace_several(nbd, links, owner, index)
    (link,) = links
    await nbd.ask(_reconfigure(index, owner, sockets=[link.socket.fileno()], timeout_s=_MARK_S))
    if not _was_taken(link.socket):
        return ()
    await nbd.ask(_reconfigure(index, owner, timeout_s=0))
    host.set_retry_interval(index)
    _forget_timeout(link.socket)
    return (link,)


async def _replace_several(nbd: KernelNbd, links: Sequence[Link], owner: Owner, index: int) -> tuple[Link, ...]:
    """One by one, and none any more once one was not taken for long. A device found with more places gets no more."""
    taken: list[Link] = []
    with StandIn() as stand_in:
        if not await _is_taken(nbd, stand_in.socket, owner, index):
            return ()
        for link in links:
            if not await _is_taken(nbd, link.socket, owner, index):
                break
            _forget_timeout(link.socket)
            taken.append(link)
        await stand_in.settle()
    return tuple(taken)


async def _is_taken(nbd: KernelNbd, offered: socket.socket, owner: Owner, index: int) -> bool:
    """Whether the kernel takes it, now or as soon as another socket is dead."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _DYING_S
    while True:
        await nbd.ask(_reconfigure(index, owner, sockets=[offered.fileno()]))
        if _was_taken(offered) or loop.time() >= end:
            return _was_taken(offered)
        await asyncio.sleep(_POLL_S)


def _was_taken(offered: socket.socket) -> bool:
    return offered.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, len(_NO_TIMEOUT)) != _NO_TIMEOUT


def _forget_timeout(taken: socket.socket) -> None:
    """Back-pressure may take as long as it does."""
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_TIMEOUT)


async def resize(nbd: KernelNbd, host: Host, owner: Owner, index: int, size_bytes: int) -> bool:
    """Show the device's new size; false where it has that already. Raises Conflict for a smaller one."""
    grown = check_size(host, index, size_bytes)
    if grown is not None:
        await nbd.ask(_reconfigure(index, owner, size_bytes=grown))
    return grown is not None


def check_size(host: Host, index: int, size_bytes: int) -> int | None:
    """`size_bytes` where the device is to grow to it, None where it has that size. Raises Conflict for less."""
    device = host.find(index)
    now_bytes = device.size_bytes if device else size_bytes
    if size_bytes < now_bytes:
        raise Conflict(
            f"/dev/nbd{index} has {now_bytes} bytes, and the front-end offers {size_bytes}: volumes only grow"
        )
    return size_bytes if size_bytes > now_bytes else None


def _reconfigure(
    index: int,
    owner: Owner,
    *,
    sockets: Sequence[int] = (),
    size_bytes: int | None = None,
    timeout_s: int | None = None,
) -> Request:
    return Request(
        Command.RECONFIGURE,
        index=index,
        sockets=sockets,
        size_bytes=size_bytes,
        timeout_s=timeout_s,
        backend=owner.backend,
    )
