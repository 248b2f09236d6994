"""The kernel's nbd driver as far as `cairn attach` sees it, for tests without one: sockets in, sysfs out.

It is no mock of what was seen once, but the rules of drivers/block/nbd.c that the code rests on: as many sockets as a
device was connected with, a RECONFIGURE that takes the first dead one's place and is silently ignored while all are
alive, the send timeout that a socket gets while there is a timeout, the socket that a queue's requests go to, and the
word of a link's death. tests/test_linux_host_attach.py holds it against a real kernel.
"""

import asyncio
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
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
        self.sockets: list[socket.socket] = []
        self.timeout_s = 0
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        """What happens after each socket that is taken in the place of another one."""
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
            told_alone = request.command is Command.CONNECT or not request.sockets
            assert told_alone, "it waits for requests in flight first, and they may wait for this very socket"
            self._write("size", request.size_bytes // 512)
        if request.command is Command.DISCONNECT:
            self._disconnect()
            return None
        for number in request.sockets:
            if request.command is Command.CONNECT:
                self.sockets.append(self._own(number))
            elif self._take(number) and self.meanwhile is not None:
                await self.meanwhile()
        return 0

    async def dead_links(self) -> AsyncIterator[int]:
        while True:
            yield await self._dead.get()

    @property
    def link(self) -> socket.socket:
        """The first queue's own."""
        return self.sockets[0]

    def route(self, queue: int) -> int | None:
        """Which of the sockets a request of that queue goes to; None where it waits."""
        living = [place for place, each in enumerate(self.sockets) if _is_alive(each)]
        return queue if queue in living else next(iter(living), None)

    async def read(self, offset: int, length: int, queue: int = 0) -> bytes:
        """As a file system would, over the socket that is the queue's. Raises ConnectionError."""
        place = self.route(queue)
        if place is None:
            raise ConnectionError("all links are dead")
        connection = self.sockets[place].dup()
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(
                connection, wire.serialize_request(wire.Command.READ, 0, 1 << 32 | queue << 16 | 7, offset, length)
            )
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
        """One of its sockets is, as far as it knows."""
        return any(_is_alive(each) for each in self.sockets)

    def _check_backend(self, request: Request) -> None:
        if request.command is Command.CONNECT:
            if self.sockets:
                raise Conflict("in use")
            self._backend = request.backend or ""
            for name, value in {"pid": os.getpid(), "backend": self._backend, "ro": 0}.items():
                self._write(name, value)
        elif request.command is Command.RECONFIGURE and request.backend != self._backend:
            raise CairnError("backend image doesn't match")

    def _take(self, number: int) -> bool:
        """False for ENOSPC, which the driver does not tell."""
        dead = [place for place, each in enumerate(self.sockets) if not _is_alive(each)]
        if dead:
            self.sockets[dead[0]].close()
            self.sockets[dead[0]] = self._own(number)
        return bool(dead)

    def _own(self, number: int) -> socket.socket:
        taken = socket.socket(fileno=os.dup(number))
        if self.timeout_s:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", self.timeout_s, 0))
        return taken

    def _disconnect(self) -> None:
        for each in self.sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.sockets.clear()
        for name in ("pid", "backend"):
            (self._place / name).unlink(missing_ok=True)

    def _write(self, name: str, value: object) -> None:
        (self._place / name).write_text(f"{value}\n")


def _is_alive(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return not poll.poll(0)
