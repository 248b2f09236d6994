"""For tests: the server in this process, a volume that completes when told to, and a client without manners."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from blockstore.units import KIB, MIB
from nbd_server import wire
from nbd_server.device import Device
from nbd_server.exports import Export, Exports
from nbd_server.limits import Limits
from nbd_server.security import Security
from nbd_server.server import NbdServer
from nbd_server.volume import Buffer
from nbd_server.wire import Option
from tests.memory_nbd import MemoryVolume
from tests.nbd_client import NbdClient

SIZE = 64 * MIB
LIMIT_S = 60.0


class HeldVolume(MemoryVolume):
    """In memory; while `holding`, reads and writes complete only by `release`."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.holding = False
        self.held: list[tuple[asyncio.Future[Any], asyncio.Future[Any]]] = []
        """What was answered to the caller, and what will be the answer."""
        self.error: Exception | None = None
        self.writes = 0

    def read(self, start: int, count: int) -> asyncio.Future[Any]:
        return self._hold(super().read(start, count))

    def write(self, start: int, data: Buffer) -> asyncio.Future[None]:
        if self.error is not None:
            raise self.error
        self.writes += 1
        return self._hold(super().write(start, data))

    def release(self, index: int = 0) -> None:
        answered, done = self.held.pop(index)
        answered.set_result(done.result())

    @property
    def held_lengths(self) -> list[int]:
        """Of the reads that are held."""
        return [len(done.result() or b"") for _, done in self.held]

    def release_all(self) -> None:
        self.holding = False
        while self.held:
            self.release()

    def _hold(self, done: asyncio.Future[Any]) -> asyncio.Future[Any]:
        if not self.holding:
            return done
        answered = asyncio.get_running_loop().create_future()
        self.held.append((answered, done))
        return answered


class Served:
    """A server on TCP with three exports of one volume, and clients of it with and without manners."""

    def __init__(self, limits: Limits | None, security: Security | None = None) -> None:
        self.volume = HeldVolume()
        self.exports = Exports()
        self._device = Device(self.volume)
        self.add_export("disk")
        self.add_export("other")
        self.add_export("fixed", read_only=True)
        self.server = NbdServer(self.exports, limits, security)
        self.port = 0

    def add_export(self, name: str, *, read_only: bool = False) -> None:
        self.exports.add(Export(name, self._device, read_only=read_only))

    @property
    def unsent_bytes(self) -> int:
        """Replies that wait in the server, of all connections."""
        return sum(connection._transport.get_write_buffer_size() for connection in self.server._connections)

    def answered(self, command: int) -> int:
        """The requests of that command that ended, of all connections."""
        return self._device.counts.ended[command]

    @property
    def waiting_count(self) -> int:
        """Connections that wait for memory which others have."""
        return self.server._budget.waiting_count

    async def client(self, name: str = "disk", source: str = "") -> NbdClient:
        """source: the address that it comes from."""
        return await NbdClient.connect(f"nbd://127.0.0.1:{self.port}/{name}", source)

    async def raw(self, name: str | None = "disk") -> "Raw":
        """A connection after its handshake; None: before it. Its kernel holds little of what it does not read."""
        connecting = socket.socket()
        connecting.setblocking(False)
        connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        await asyncio.get_running_loop().sock_connect(connecting, ("127.0.0.1", self.port))
        raw = Raw(*await asyncio.open_connection(sock=connecting))
        await raw.reader.readexactly(18)
        if name is not None:
            hello = wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.EXPORT_NAME, name.encode())
            raw.send(hello)
            await raw.reader.readexactly(10)
        return raw


class Raw:
    """Bytes to and from the server, whatever they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def request(self, command: int, offset: int, length: int, cookie: int = 0, flags: int = 0) -> None:
        self.send(wire.serialize_request(command, flags, cookie, offset, length))

    async def reply(self, length: int = 0) -> tuple[int, int]:
        """A reply's error and cookie; `length` bytes after it are read and dropped."""
        async with asyncio.timeout(LIMIT_S):
            magic, error, cookie = struct.unpack(">IIQ", await self.reader.readexactly(16))
            assert magic == wire.SIMPLE_REPLY_MAGIC
            await self.reader.readexactly(length)
        return error, cookie

    async def ended(self) -> bytes:
        """All that came before the server ended the connection."""
        data = b""
        async with asyncio.timeout(LIMIT_S):
            try:
                while piece := await self.reader.read(MIB):
                    data += piece
            except ConnectionError:
                pass
        self.writer.close()
        return data

    def reset(self) -> None:
        """End it with RST: nobody asks what is still under way."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


@asynccontextmanager
async def serving(security: Security | None = None, **limits: Any) -> AsyncIterator[Served]:
    """A server; at the end nobody may hold anything any more."""
    served = Served(Limits(**limits) if limits else None, security)
    _, served.port = await served.server.listen_tcp("127.0.0.1", 0)
    try:
        yield served
        served.volume.release_all()
        async with asyncio.timeout(LIMIT_S):
            await served.server.close()
        assert (served.server.connection_count, served.server.in_flight_bytes) == (0, 0)
    finally:
        served.volume.release_all()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - nobody tells of these
            await asyncio.sleep(0.005)


async def most_while_connected(served: Served, besides: int, value: Callable[[], int]) -> int:
    """The highest value until no more than `besides` connections are left."""
    most = 0
    async with asyncio.timeout(LIMIT_S):
        while served.server.connection_count > besides:
            most = max(most, value())
            await asyncio.sleep(0.005)
    return most


async def settled(value: Callable[[], int]) -> int:
    """The value once it stays the same for a while."""
    last, same = value(), 0
    while same < 10:
        await asyncio.sleep(0.01)
        last, same = value(), same + 1 if value() == last else 0
    return last
