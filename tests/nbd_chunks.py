"""For tests: chunks of structured and extended replies, parsed from the NBD text, apart from the server's code."""

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

_STRUCTURED: Final = struct.Struct(">IHHQI")
_EXTENDED: Final = struct.Struct(">IHHQQQ")
_SIMPLE: Final = struct.Struct(">IIQ")


@dataclass(frozen=True)
class Chunk:
    """A chunk, or a simple reply as one: NONE or ERROR. offset: of the request, where the header says it."""

    NONE: ClassVar[int] = 0
    OFFSET_DATA: ClassVar[int] = 1
    OFFSET_HOLE: ClassVar[int] = 2
    BLOCK_STATUS: ClassVar[int] = 5
    BLOCK_STATUS_EXT: ClassVar[int] = 6
    ERROR: ClassVar[int] = 0x8001
    ERROR_OFFSET: ClassVar[int] = 0x8002

    kind: int
    cookie: int
    payload: bytes
    done: bool
    offset: int | None = None

    @property
    def error(self) -> int:
        """Its error, 0 where it is none."""
        return int.from_bytes(self.payload[:4], "big") if self.kind & 0x8000 else 0


def header_bytes(start: bytes) -> int:
    """How long the header is that begins with these 4 bytes."""
    sizes = {0x67446698: _SIMPLE.size, 0x668E33EF: _STRUCTURED.size, 0x6E8A278C: _EXTENDED.size}
    return sizes[int.from_bytes(start, "big")]


def parse_header(header: bytes) -> tuple[Chunk, int]:
    """A chunk without its payload, and the payload's length."""
    if len(header) == _SIMPLE.size:
        _, error, cookie = _SIMPLE.unpack(header)
        payload = struct.pack(">IH", error, 0) if error else b""
        return Chunk(Chunk.ERROR if error else Chunk.NONE, cookie, payload, done=True), 0
    if len(header) == _STRUCTURED.size:
        _, flags, kind, cookie, length = _STRUCTURED.unpack(header)
        offset = None
    else:
        _, flags, kind, cookie, offset, length = _EXTENDED.unpack(header)
    assert flags & ~1 == 0, "only DONE is defined"
    return Chunk(kind, cookie, b"", bool(flags), offset), length


def parse_chunks(data: bytes) -> list[Chunk]:
    """All chunks of one reply; the last one is DONE, and no other."""
    chunks = []
    while data:
        size = header_bytes(data[:4])
        chunk, length = parse_header(data[:size])
        assert len(data) >= size + length
        payload = data[size : size + length] or chunk.payload
        chunks.append(Chunk(chunk.kind, chunk.cookie, payload, chunk.done, chunk.offset))
        data = data[size + length :]
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return chunks


def read_from(chunks: list[Chunk], offset: int, length: int) -> bytes:
    """What the content chunks of a read say; each byte of the request must be said once."""
    content: list[bytes | None] = [None] * length
    for chunk in chunks:
        if chunk.kind == Chunk.NONE:
            continue
        at = int.from_bytes(chunk.payload[:8], "big") - offset
        assert chunk.kind in (Chunk.OFFSET_DATA, Chunk.OFFSET_HOLE)
        if chunk.kind == Chunk.OFFSET_HOLE:
            assert len(chunk.payload) == 12
            piece = bytes(int.from_bytes(chunk.payload[8:], "big"))
        else:
            piece = chunk.payload[8:]
        assert piece, "a chunk says something"
        assert 0 <= at <= at + len(piece) <= length
        assert all(byte is None for byte in content[at : at + len(piece)]), "chunks overlap"
        content[at : at + len(piece)] = [piece[i : i + 1] for i in range(len(piece))]
    assert None not in content, "a part of the request is missing"
    return b"".join(byte for byte in content if byte is not None)
