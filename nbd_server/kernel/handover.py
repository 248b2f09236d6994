"""Handing links to the kernel: the first one with a device, later ones in place of one that is dead.

RECONFIGURE says nothing where no socket of the device is dead: it takes none, and succeeds. So it is given a timeout
together with the socket: a socket that the kernel takes while there is one gets it as its send timeout, which shows on
our own descriptor of the same socket. Then both timeouts are taken back. (While there is a timeout, an old socket that
still seems alive dies of the next request that expires; so a hung front-end's one is got rid of that way, too.)
Source: Linux, drivers/block/nbd.c, nbd_reconnect_socket and nbd_xmit_timeout.
"""

import socket
from typing import Final

from blockstore.errors import Conflict
from blockstore.units import BLOCK_SIZE
from nbd_server.kernel.devices import Host, Owner
from nbd_server.kernel.link import Link
from nbd_server.kernel.messages import Command, Request
from nbd_server.kernel.netlink import KernelNbd

#: Whole seconds are all that there is.
_MARK_S: Final = 1
_NO_TIMEOUT: Final = bytes(16)
"""A struct timeval of zeros: socket(7), SO_SNDTIMEO."""


async def connect(
    nbd: KernelNbd, host: Host, link: Link, owner: Owner, *, index: int | None, dead_timeout_s: int
) -> int:
    """Make a device of the link, of that index or a free one; its index. Raises what KernelNbd.ask does."""
    given = await nbd.ask(
        Request(
            Command.CONNECT,
            index=index,
            sockets=[link.socket.fileno()],
            size_bytes=link.agreed.size_bytes,
            block_size_bytes=BLOCK_SIZE,
            server_flags=link.agreed.flags,
            timeout_s=0,
            dead_timeout_s=dead_timeout_s,
            backend=owner.backend,
        )
    )
    assert given is not None, "the kernel answers a CONNECT with the device's index"
    host.set_retry_interval(given)
    return given


async def replace(nbd: KernelNbd, host: Host, link: Link, owner: Owner, index: int) -> bool:
    """Whether the kernel took the link in place of a dead one; false while the old one seems alive to it.

    Raises Conflict where the export is smaller than the device: that is another volume's content, or a defect.
    """
    grown = check_size(host, index, link.agreed.size_bytes)
    await nbd.ask(_reconfigure(index, owner, sockets=[link.socket.fileno()], size_bytes=grown, timeout_s=_MARK_S))
    if link.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, len(_NO_TIMEOUT)) == _NO_TIMEOUT:
        return False
    await nbd.ask(_reconfigure(index, owner, timeout_s=0))
    host.set_retry_interval(index)
    link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NO_TIMEOUT)
    return True


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
    sockets: list[int] | None = None,
    size_bytes: int | None = None,
    timeout_s: int | None = None,
) -> Request:
    return Request(
        Command.RECONFIGURE,
        index=index,
        sockets=sockets or (),
        size_bytes=size_bytes,
        timeout_s=timeout_s,
        backend=owner.backend,
    )
