"""The kernel's nbd driver as far as `cairn attach` sees it, for tests without one: sockets in, sysfs out.

It is no mock of what was seen once, but the rules of drivers/block/nbd.c that the code rests on: one socket a device, a
RECONFIGURE that is silently ignored while that one is alive, the send timeout that a socket gets while there is a
timeout, and the word of a link's death. tests/test_linux_host_attach.py holds it against a real kernel.
"""

import asyncio
import os
import select
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from blockstore.errors import CairnError, Conflict
from nbd_server import wire
from nbd_server.kernel.messages import Command, Request


class ModelKernel:
    """One device, nbd0. root: where its sysfs is."""

    def __init__(self, root: Path) -> None:
        self._place = root / "sys" / "block" / "nbd0"
        (self._place / "queue").mkdir(parents=True)
        self.socket: socket.socket | None = None
        self.timeout_s = 0
        self.requests: list[Command] = []
        self._dead: asyncio.Queue[int] = asyncio.Queue()
        self._backend = ""
        self.show_traffic(0, 0)

    async def ask(self, request: Request) -> int | None:
        self.requests.append(request.command)
        assert request.index in (None, 0)
        self._check_backend(request)
        if request.timeout_s is not None:
            self.timeout_s = request.timeout_s
        if request.size_bytes is not None:
            self._write("size", request.size_bytes // 512)
        if request.command is Command.DISCONNECT:
            self._disconnect()
            return None
        for number in request.sockets:
            self._take(number)
        return 0

    async def dead_links(self) -> AsyncIterator[int]:
        while True:
            yield await self._dead.get()

    async def read(self, offset: int, length: int) -> bytes:
        """As a file system would, over the socket that there is. Raises ConnectionError."""
        assert self.socket is not None
        connection = self.socket.dup()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(connection, wire.serialize_request(wire.Command.READ, 0, 7, offset, length))
            answer = b""
            while len(answer) < 16 + length:
                piece = await loop.sock_recv(connection, 16 + length - len(answer))
                if not piece:
                    raise ConnectionError("the link is dead")
                answer += piece
            return answer[16:]
        except ConnectionError:
            self._dead.put_nowait(0)
            raise
        finally:
            connection.close()

    def show_traffic(self, in_flight: int, completed: int) -> None:
        """What its counters say from now on."""
        self._write("inflight", f"{in_flight} 0")
        self._write("stat", f"{completed} " + "0 " * 16)

    @property
    def alive(self) -> bool:
        """Its socket is, as far as it knows."""
        if self.socket is None:
            return False
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return not poll.poll(0)

    def _check_backend(self, request: Request) -> None:
        if request.command is Command.CONNECT:
            if self.socket is not None:
                raise Conflict("in use")
            self._backend = request.backend or ""
            for name, value in {"pid": os.getpid(), "backend": self._backend, "ro": 0}.items():
                self._write(name, value)
        elif request.command is Command.RECONFIGURE and request.backend != self._backend:
            raise CairnError("backend image doesn't match")

    def _take(self, number: int) -> None:
        if self.alive:
            return  # ENOSPC, which the driver does not tell
        self.socket = socket.socket(fileno=os.dup(number))
        if self.timeout_s:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", self.timeout_s, 0))

    def _disconnect(self) -> None:
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self.socket.close()
        self.socket = None
        for name in ("pid", "backend"):
            (self._place / name).unlink(missing_ok=True)

    def _write(self, name: str, value: object) -> None:
        (self._place / name).write_text(f"{value}\n")
