"""What a daemon and systemd say to each other: it is ready, it stops, and here are sockets that listen already.

Nothing of it happens where systemd did not start the process: it names itself in the environment. Sources:
sd_notify(3), sd_listen_fds(3).
"""

import os
import socket
from contextlib import suppress
from typing import Final

from blockstore.errors import InvalidRequest

_FIRST_DESCRIPTOR: Final = 3
_LISTENING: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def notify(message: str) -> None:
    """Lines such as READY=1, STOPPING=1, STATUS=text."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    # Whoever listened there may be gone by now: a daemon does not end for want of somebody to tell.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.setblocking(False)
        told.sendto(message.encode(), "\0" + address[1:] if address.startswith("@") else address)


def listening_sockets() -> list[socket.socket]:
    """The stream sockets that were passed to this process, once; children do not get them.

    Raises InvalidRequest where something else was passed.
    """
    given = {name: os.environ.pop(name, "") for name in _LISTENING}
    if given["LISTEN_PID"] != str(os.getpid()):
        return []
    count = given["LISTEN_FDS"]
    if not count.isascii() or not count.isdigit():
        raise InvalidRequest(f"LISTEN_FDS={count!r} is no number of sockets: see sd_listen_fds(3)")
    return [_listening(_FIRST_DESCRIPTOR + index) for index in range(int(count))]


def _listening(descriptor: int) -> socket.socket:
    try:
        found = socket.socket(fileno=descriptor)
        os.set_inheritable(descriptor, False)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise InvalidRequest(
            f"descriptor {descriptor}, which was passed to listen at, is no socket: {error}"
        ) from error
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if not listens or found.type != socket.SOCK_STREAM or found.family not in families:
        raise InvalidRequest(
            f"descriptor {descriptor} was passed to listen at, and is no stream socket of TCP or unix that listens: "
            "the .socket unit needs ListenStream="
        )
    return found
