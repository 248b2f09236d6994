"""A small NBD client for tests: requests are pipelined over one connection, answers come in any order.

Written from doc/proto.md of the NetworkBlockDevice project, apart from the server's own parsing, so
that a misreading there is not shared here. It speaks fixed newstyle with GO and simple replies.
"""

import asyncio
import struct
from enum import IntEnum
from typing import Final
from urllib.parse import urlsplit

_GREETING: Final = struct.Struct(">8s8sH")
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_GO: Final = 7
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REPLY_ACK, _REPLY_INFO = 1, 3
_INFO_EXPORT: Final = 0
_REQUEST_MAGIC: Final = 0x25609513
_REPLY_MAGIC: Final = 0x67446698
_FUA, _NO_HOLE = 1, 2
_CONNECT_LIMIT_S: Final = 30.0
_AGAIN_S: Final = 0.05


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class NbdError(OSError):
    """The server answered a request with an error; `errno` is it."""


class Disconnected(ConnectionError):
    """The connection ended; what was in flight may or may not have been done."""


class NbdClient:
    """One connection to one export. size_bytes and flags: as the server announced them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.size_bytes = 0
        self.flags = 0
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self._next_cookie = 1
        self._ended = False
        self._receiver: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, uri: str, source: str = "") -> "NbdClient":
        """Open nbd://HOST:PORT/EXPORT. source: the address to come from; empty: any.

        Raises Disconnected where nobody is there or the connection ends, and NbdError (errno: the
        option reply's type) where the export is refused.
        """
        parts = urlsplit(uri)
        try:
            async with asyncio.timeout(_CONNECT_LIMIT_S):
                local = (source, 0) if source else None
                client = cls(*await asyncio.open_connection(parts.hostname, parts.port, local_addr=local))
                await client._negotiate(parts.path[1:])
        except (OSError, EOFError) as error:
            if isinstance(error, NbdError):
                raise
            raise Disconnected(f"{uri}: {error}") from error
        client._receiver = asyncio.create_task(client._receive())
        return client

    @classmethod
    async def connect_soon(cls, uri: str, limit_s: float) -> "NbdClient":
        """As soon as it is exported. Raises TimeoutError."""
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    return await cls.connect(uri)
                except (NbdError, Disconnected):
                    await asyncio.sleep(_AGAIN_S)

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`. All commands raise NbdError and Disconnected."""
        return await self._request(Command.READ, 0, offset, length)

    async def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        await self._request(Command.WRITE, _FUA if fua else 0, offset, len(data), data)

    async def flush(self) -> None:
        await self._request(Command.FLUSH, 0, 0, 0)

    async def trim(self, offset: int, length: int) -> None:
        await self._request(Command.TRIM, 0, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        await self._request(Command.WRITE_ZEROES, _NO_HOLE if no_hole else 0, offset, length)

    async def close(self) -> None:
        """Say DISC and close; what is in flight is Disconnected."""
        if not self._ended:
            self._writer.write(_REQUEST.pack(_REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
        self._end(Disconnected("closed by this client"))
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)

    async def _negotiate(self, export: str) -> None:
        greeting, magic, _ = _GREETING.unpack(await self._reader.readexactly(_GREETING.size))
        assert (greeting, magic) == (b"NBDMAGIC", b"IHAVEOPT"), f"not an NBD server: {greeting + magic!r}"
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._writer.write(struct.pack(">I", 3) + _OPTION.pack(b"IHAVEOPT", _GO, len(data)) + data)
        while True:
            magic, option, kind, length = _OPTION_REPLY.unpack(await self._reader.readexactly(_OPTION_REPLY.size))
            assert (magic, option) == (_OPTION_REPLY_MAGIC, _GO), f"no reply to GO: {magic:#x}, {option}"
            reply = await self._reader.readexactly(length)
            if kind == _REPLY_ACK:
                return
            if kind != _REPLY_INFO:
                self._writer.close()
                raise NbdError(kind, f"{export} is refused: {reply.decode(errors='replace')}")
            if reply[:2] == struct.pack(">H", _INFO_EXPORT):
                self.size_bytes, self.flags = struct.unpack(">QH", reply[2:])

    async def _request(self, command: Command, flags: int, offset: int, length: int, data: bytes = b"") -> bytes:
        if self._ended:
            raise Disconnected("the connection has ended")
        cookie, self._next_cookie = self._next_cookie, self._next_cookie + 1
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[cookie] = (done, length if command is Command.READ else 0)
        self._writer.write(_REQUEST.pack(_REQUEST_MAGIC, flags, command, cookie, offset, length))
        if data:
            self._writer.write(data)
        return await done

    async def _receive(self) -> None:
        try:
            while True:
                magic, error, cookie = _REPLY.unpack(await self._reader.readexactly(_REPLY.size))
                assert magic == _REPLY_MAGIC, f"no simple reply: {magic:#x}"
                done, length = self._waiting.pop(cookie)
                content = await self._reader.readexactly(length) if not error else b""
                if done.cancelled():
                    continue
                if error:
                    done.set_exception(NbdError(error, f"the server answers with error {error}"))
                else:
                    done.set_result(content)
        except (OSError, EOFError) as error:
            self._end(Disconnected(f"the connection has ended: {error}"))

    def _end(self, error: Disconnected) -> None:
        self._ended = True
        self._writer.close()
        for done, _ in self._waiting.values():
            if not done.done():
                done.set_exception(error)
        self._waiting.clear()
