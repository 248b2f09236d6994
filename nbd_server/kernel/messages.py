"""The generic netlink messages of the kernel's nbd driver, as pyroute2 writes and reads them.

Source: Linux, include/uapi/linux/nbd-netlink.h. What is asked for is a `Request`; pyroute2 lacks this family only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from pyroute2.netlink import NLA_F_NESTED, genlmsg, nla

FAMILY: Final = "nbd"
MULTICAST_GROUP: Final = "nbd_mc_group"
VERSION: Final = 1


class Command(IntEnum):
    """NBD_CMD_…"""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class SocketItem(nla):  # type: ignore[misc]
    """One socket."""

    nla_flags = NLA_F_NESTED
    nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))


class Sockets(nla):  # type: ignore[misc]
    """A list of sockets."""

    nla_flags = NLA_F_NESTED
    nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "SocketItem"))
    SocketItem = SocketItem


class NbdMessage(genlmsg):  # type: ignore[misc]
    """Any message of the family, in either direction. Attributes that are not known are skipped."""

    nla_map = (
        ("NBD_ATTR_UNSPEC", "none"),
        ("NBD_ATTR_INDEX", "uint32"),
        ("NBD_ATTR_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
        ("NBD_ATTR_TIMEOUT", "uint64"),
        ("NBD_ATTR_SERVER_FLAGS", "uint64"),
        ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
        ("NBD_ATTR_SOCKETS", "Sockets"),
        ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
        ("NBD_ATTR_DEVICE_LIST", "hex"),
        ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
    )
    Sockets = Sockets


@dataclass(frozen=True, slots=True)
class Request:
    """What the kernel is asked for; None leaves an attribute out. Sizes in bytes, timeouts in seconds.

    index: of /dev/nbdN. sockets: file descriptors. backend: whose device it is; the kernel keeps it, and takes a
    RECONFIGURE only with the same.
    """

    command: Command
    index: int | None = None
    sockets: Sequence[int] = ()
    size_bytes: int | None = None
    block_size_bytes: int | None = None
    server_flags: int | None = None
    timeout_s: int | None = None
    dead_timeout_s: int | None = None
    backend: str | None = None


def to_message(request: Request) -> Any:
    """The request as pyroute2's message, whose header is filled in when it is sent."""
    values = {
        "NBD_ATTR_INDEX": request.index,
        "NBD_ATTR_SIZE_BYTES": request.size_bytes,
        "NBD_ATTR_BLOCK_SIZE_BYTES": request.block_size_bytes,
        "NBD_ATTR_TIMEOUT": request.timeout_s,
        "NBD_ATTR_SERVER_FLAGS": request.server_flags,
        "NBD_ATTR_DEAD_CONN_TIMEOUT": request.dead_timeout_s,
        "NBD_ATTR_BACKEND_IDENTIFIER": request.backend,
    }
    message = NbdMessage()
    message["cmd"], message["version"] = int(request.command), VERSION
    message["attrs"] = [(name, value) for name, value in values.items() if value is not None]
    if request.sockets:
        items = [("NBD_SOCK_ITEM", {"attrs": [("NBD_SOCK_FD", number)]}) for number in request.sockets]
        message["attrs"].append(("NBD_ATTR_SOCKETS", {"attrs": items}))
    return message
