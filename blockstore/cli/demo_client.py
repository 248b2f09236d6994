"""A minimal NBD client: what `cairn demo` writes and reads back with, where nothing is installed.

Fixed newstyle, one export, one request at a time. Section names are those of the NBD project's
doc/proto.md. A command that the server refuses raises OSError with the errno of the protocol.
"""

import asyncio
import os
import ssl
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

from nbd_server.uri import NbdTarget

_NBDMAGIC: Final = b"NBDMAGIC"
_IHAVEOPT: Final = b"IHAVEOPT"
_FIXED_NEWSTYLE_NO_ZEROES: Final = 0b11
_OPT_STARTTLS: Final = 5
_OPT_GO: Final = 7
_REP_ACK: Final = 1
_REP_INFO: Final = 3
_INFO_EXPORT: Final = 0
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_REQUEST_MAGIC: Final = 0x25609513
_SIMPLE_REPLY_MAGIC: Final = 0x67446698
_CMD_READ, _CMD_WRITE, _CMD_DISC = 0, 1, 2
_MAX_OPTION_REPLY: Final = 64 * 1024

_GREETING: Final = struct.Struct(">8s8sH")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE_REPLY: Final = struct.Struct(">IIQ")


class NbdClient:
    """A connection to one export: `async with await NbdClient.connect(target) as client`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._cookie = 0
        self.size_bytes = 0

    @classmethod
    async def connect(cls, target: NbdTarget, context: ssl.SSLContext | None = None) -> "NbdClient":
        """Connect and negotiate, under TLS by `context`. Raises OSError where there is no such server or export."""
        if target.socket_path:
            reader, writer = await asyncio.open_unix_connection(target.socket_path)
        else:
            reader, writer = await asyncio.open_connection(target.host, target.port)
        client = cls(reader, writer)
        await client._greet()
        if context is not None:
            await client._start_tls(context, target.host)
        await client._negotiate(target.export)
        return client

    async def __aenter__(self) -> "NbdClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Part in good order, where the connection is still good."""
        if error is None:
            self._writer.write(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, self._cookie, 0, 0))
            await self._writer.drain()
        self._writer.close()

    async def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        await self._request(_CMD_READ, offset, length)
        return await self._reader.readexactly(length)

    async def write(self, offset: int, data: bytes) -> None:
        """Returns when the server has acknowledged it."""
        await self._request(_CMD_WRITE, offset, len(data), data)

    async def _greet(self) -> None:
        """The beginning of the handshake: "Newstyle negotiation"."""
        magic, option_magic, flags = _GREETING.unpack(await self._reader.readexactly(_GREETING.size))
        if (magic, option_magic) != (_NBDMAGIC, _IHAVEOPT) or not flags & 1:
            raise ConnectionError("the other side speaks no fixed newstyle NBD")
        self._writer.write(struct.pack(">I", flags & _FIXED_NEWSTYLE_NO_ZEROES))

    async def _start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """NBD_OPT_STARTTLS; what follows is encrypted."""
        self._writer.write(_IHAVEOPT + struct.pack(">II", _OPT_STARTTLS, 0))
        await self._option_reply()
        await self._writer.start_tls(context, server_hostname=host)

    async def _negotiate(self, export: str) -> None:
        """The export: NBD_OPT_GO."""
        name = export.encode()
        payload = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._writer.write(_IHAVEOPT + struct.pack(">II", _OPT_GO, len(payload)) + payload)
        while True:
            kind, body = await self._option_reply()
            if kind == _REP_ACK:
                return
            if kind == _REP_INFO and struct.unpack_from(">H", body)[0] == _INFO_EXPORT:
                _, self.size_bytes, _ = struct.unpack(">HQH", body)

    async def _option_reply(self) -> tuple[int, bytes]:
        magic, _, kind, length = _OPTION_REPLY.unpack(await self._reader.readexactly(_OPTION_REPLY.size))
        if magic != _OPTION_REPLY_MAGIC or length > _MAX_OPTION_REPLY:
            raise ConnectionError("an option's reply is not what NBD says it is")
        body = await self._reader.readexactly(length)
        if kind & 1 << 31:
            raise ConnectionError(f"the server refuses the export: {body.decode(errors='replace')} ({kind:#x})")
        return kind, body

    async def _request(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        """Send one request and read the head of its reply ("Simple reply message")."""
        self._cookie += 1
        self._writer.write(_REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, offset, length) + data)
        await self._writer.drain()
        magic, error, cookie = _SIMPLE_REPLY.unpack(await self._reader.readexactly(_SIMPLE_REPLY.size))
        if magic != _SIMPLE_REPLY_MAGIC or cookie != self._cookie:
            raise ConnectionError("a reply is not for the request that was made")
        if error:
            raise OSError(error, f"the server answers {os.strerror(error)}")


#: How an export is reached.
Connect = Callable[[NbdTarget], Awaitable[NbdClient]]
