"""A server between a client and a real S3 server that answers some requests wrongly.

One connection carries one request, which is passed on as it is; then its answer may be changed. It runs in the
loop of the test. `faults` is a list of what befalls the next requests, one each; then all goes well.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Final

from blockstore.config import join_address, split_address

#: Of an answer, whole with its head: what the client gets; the connection ends behind it.
Fault = Callable[[bytes], bytes]
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CONNECTION: Final = re.compile(rb"\r\nconnection: [^\r]*", re.IGNORECASE)


def slow_down(answer: bytes) -> bytes:
    """503, as S3 says it."""
    return _refused(b"503 Slow Down", b"SlowDown")


def too_many_requests(answer: bytes) -> bytes:
    """429, as some servers and what stands before them say it."""
    return b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def internal_error(answer: bytes) -> bytes:
    return _refused(b"500 Internal Server Error", b"InternalError")


def lost(answer: bytes) -> bytes:
    """The server did it, and its answer never comes."""
    return b""


def truncated(answer: bytes) -> bytes:
    """Half of the body that the head promises."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + body[: len(body) // 2]


def _refused(status: bytes, code: bytes) -> bytes:
    body = b"<Error><Code>" + code + b"</Code><Message>later</Message></Error>"
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)


class FaultyServer:
    """Listens at `address`; use it as `async with FaultyServer(target) as server`. requests: how many came."""

    def __init__(self, target: str) -> None:
        self._target = split_address(target)
        self.faults: list[Fault] = []
        self.requests = 0
        self._server: asyncio.Server

    async def __aenter__(self) -> "FaultyServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = join_address(*self._server.sockets[0].getsockname()[:2])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1]) if length else 0)
            self.requests += 1
            fault = self.faults.pop(0) if self.faults else bytes
            writer.write(fault(await self._answer_to(head, body)))
            await writer.drain()
            writer.write_eof()
        except (OSError, asyncio.IncompleteReadError):
            return  # a connection without a request, or the client has gone
        finally:
            writer.close()

    async def _answer_to(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._target)
        try:
            once = _CONNECTION.sub(b"", head).removesuffix(b"\r\n\r\n") + b"\r\nConnection: close\r\n\r\n"
            writer.write(once + body)
            return await reader.read(-1)
        finally:
            writer.close()
