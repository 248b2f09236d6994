"""Requests to the kernel's nbd driver, and its word of links that died.

    async with kernel_nbd() as nbd:
        index = await nbd.ask(Request(Command.CONNECT, ...))

The kernel answers at once; what it refuses is raised as an error of the tree.
"""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket

from blockstore.errors import CairnError, Conflict, NotFound
from nbd_server.kernel.messages import FAMILY, MULTICAST_GROUP, Command, NbdMessage, Request, to_message

_ADVICE: Final = {
    errno.EBUSY: "it is in use: name another one, or none to get a free one",
    errno.EPERM: "only root may do this: run it with sudo",
}


class _Socket(AsyncGenericNetlinkSocket):  # type: ignore[misc]
    module_err_level = "debug"  # we say it ourselves


class KernelNbd:
    """The driver, over a netlink socket of its own."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def ask(self, request: Request) -> int | None:
        """Carry it out; the device's index where the answer has one.

        Raises Conflict where the device is in use or the caller is not root, NotFound where there is none of that
        index, and CairnError for what else the kernel refuses.
        """
        message = to_message(request)
        try:
            answers = await self._socket.nlm_request(
                message, msg_type=self._socket.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK
            )
            indexes = [each.get_attr("NBD_ATTR_INDEX") async for each in answers]
        except NetlinkError as error:
            raise _refused(request, error.code) from error
        return next((int(each) for each in indexes if each is not None), None)

    async def dead_links(self) -> AsyncIterator[int]:
        """The index of each device whose socket has died, as it does, on this socket from now on.

        The kernel drops such words where they are not fetched in time: whoever rests on them looks for himself, too.
        """
        self._socket.add_membership(MULTICAST_GROUP)
        while True:
            try:
                async for message in self._socket.get():
                    # An acknowledgement that came behind an answer is here as well.
                    if isinstance(message, NbdMessage) and message["cmd"] == Command.LINK_DEAD:
                        yield int(message.get_attr("NBD_ATTR_INDEX"))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


@asynccontextmanager
async def kernel_nbd() -> AsyncIterator[KernelNbd]:
    """The driver of this host's kernel. Raises NotFound where it is not loaded."""
    socket = _Socket()
    try:
        try:
            await socket.bind(FAMILY, NbdMessage)
        except NetlinkError as error:
            raise NotFound(
                "this kernel has no nbd driver loaded: load it with `sudo modprobe nbd` (in a container: on its host)"
            ) from error
        yield KernelNbd(socket)
    finally:
        socket.close()


def _refused(request: Request, code: int) -> CairnError:
    device = "a device" if request.index is None else f"/dev/nbd{request.index}"
    advice = _ADVICE.get(code, "see the kernel's log (`dmesg`) for why")
    message = f"the kernel refuses to {request.command.name.lower()} {device}: {os.strerror(code)}; {advice}"
    if code in _ADVICE:
        return Conflict(message)
    return NotFound(message) if code in (errno.ENODEV, errno.ENOENT) else CairnError(message)
