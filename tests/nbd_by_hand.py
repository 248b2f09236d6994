"""A client that takes the NBD text at its word: its numbers, options and requests, made and parsed by hand.

Nothing of the server's own tables is used here (see also nbd_chunks): what it says is judged by the text alone.
"""

import asyncio
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tests.nbd_chunks import Chunk, header_bytes, parse_header
from tests.nbd_serving import LIMIT_S, Raw, Served

# Numbers of the text, "Values".
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = range(1, 12)
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, UNKNOWN, TOO_BIG, EXT_HEADER_REQD = ((1 << 31) + n for n in (1, 2, 3, 6, 9, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << n for n in range(6))
OK, EPERM, EINVAL, ENOSPC, ENOTSUP = 0, 1, 22, 28, 95


def text(value: str) -> bytes:
    return struct.pack(">I", len(value)) + value.encode()


def asking(name: str, *items: int) -> bytes:
    """The data of INFO and GO."""
    return text(name) + struct.pack(f">H{len(items)}H", len(items), *items)


def contexts(name: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


# ---- options

#: What was agreed on before the option: options that all succeed.
BEFORE: Final[Mapping[str, tuple[tuple[int, bytes], ...]]] = {
    "nothing": (),
    "structured": ((STRUCTURED, b""),),
    "extended": ((EXTENDED, b""),),
    "both": ((STRUCTURED, b""), (EXTENDED, b"")),
    "contexts": ((STRUCTURED, b""), (SET_META, contexts("disk", "base:allocation"))),
}


async def send_option(raw: Raw, option: int, data: bytes) -> None:
    raw.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)


async def replies(raw: Raw, option: int) -> list[tuple[int, bytes]]:
    """All replies to one option, to the last; their types and data."""
    found = []
    while True:
        magic, replied, kind, length = struct.unpack(">QIII", await raw.reader.readexactly(20))
        assert (magic, replied) == (0x3E889045565A9, option)
        found.append((kind, await raw.reader.readexactly(length)))
        if kind == ACK or kind >> 31:
            return found


async def negotiating(served: Served, state: str) -> Raw:
    raw = await served.raw(None)
    raw.send(struct.pack(">I", 3))
    for option, data in BEFORE[state]:
        await send_option(raw, option, data)
        assert (await replies(raw, option))[-1][0] == ACK
    return raw


# ---- requests


@dataclass(frozen=True)
class Session:
    """How a client has negotiated: the style of its requests and replies, and contexts by their numbers."""

    raw: Raw
    flags: int
    extended: bool
    numbers: tuple[int, ...]

    def send(self, command: int, flags: int, offset: int, length: int, payload: bytes = b"") -> None:
        magic, form = (0x21E41C71, ">IHHQQQ") if self.extended else (0x25609513, ">IHHQQI")
        self.raw.send(struct.pack(form, magic, flags, command, 7, offset, length) + payload)

    async def reply(self) -> list[Chunk]:
        """All chunks of one reply; the header says the style."""
        chunks: list[Chunk] = []
        async with asyncio.timeout(LIMIT_S):
            while not chunks or not chunks[-1].done:
                start = await self.raw.reader.readexactly(4)
                header = start + await self.raw.reader.readexactly(header_bytes(start) - 4)
                assert (len(header) == 32) == self.extended, "extended headers, or none of them"
                chunk, length = parse_header(header)
                payload = await self.raw.reader.readexactly(length) or chunk.payload
                chunks.append(Chunk(chunk.kind, chunk.cookie, payload, chunk.done, chunk.offset))
        return chunks

    async def do(self, command: int, flags: int, offset: int, length: int, payload: bytes = b"") -> list[Chunk]:
        self.send(command, flags, offset, length, payload)
        return await self.reply()


STYLES: Final = ("simple", "structured", "extended")


async def session(served: Served, style: str, *queries: str, name: str = "disk") -> Session:
    raw = await served.raw(None)
    raw.send(struct.pack(">I", 3))
    if style != "simple":
        option = EXTENDED if style == "extended" else STRUCTURED
        await send_option(raw, option, b"")
        assert (await replies(raw, option)) == [(ACK, b"")]
    numbers: tuple[int, ...] = ()
    if queries:
        await send_option(raw, SET_META, contexts(name, *queries))
        told = await replies(raw, SET_META)
        numbers = tuple(struct.unpack(">I", data[:4])[0] for kind, data in told if kind == META_CONTEXT)
        assert len(set(numbers)) == len(numbers) == len(queries), "each has a number of its own"
    await send_option(raw, GO, asking(name))
    info, *_ = await replies(raw, GO)
    return Session(raw, struct.unpack(">HQH", info[1])[2], style == "extended", numbers)


def payload_of(style: str, command: int, flags: int, length: int) -> bytes:
    """NBD, "Request message": what says that a payload follows."""
    follows = flags & PAYLOAD_LEN if style == "extended" else command == WRITE
    return b"p" * length if follows else b""
