"""Replies on the wire, in the style that was negotiated. Pure.

Each returns the parts of a reply in order, to be sent as they are: large data is never copied. Without negotiation a
reply is one message (NBD, "Simple reply message"). Else whatever has a payload is chunks (NBD, "Structured reply chunk
message"), the last of which is marked DONE; what a read found to be zeroes goes as OFFSET_HOLE, and errors have words.
Success without a payload stays a simple reply there, which is shorter and allowed; with extended headers nothing but
chunks is (NBD, "Extended reply chunk message").

Invariant: a reply is made when all that it says is known, so that its last chunk may be DONE whatever it is.
"""

from struct import Struct, pack
from typing import Final, Protocol

from blockstore.units import BLOCK_SIZE
from nbd_server import wire
from nbd_server.holes import pieces
from nbd_server.metadata import Extent
from nbd_server.terms import Context, Style
from nbd_server.transmission import Refusal, Request
from nbd_server.volume import Buffer
from nbd_server.wire import CommandFlag, ReplyFlag, ReplyType

_STRUCTURED: Final = Struct(">IHHQI")
"""magic, flags, type, cookie, length of the payload."""
_EXTENDED: Final = Struct(">IHHQQQ")
"""magic, flags, type, cookie, offset of the request, length of the payload."""
_OFFSET: Final = Struct(">Q")
_HOLE: Final = Struct(">QI")
_ERROR: Final = Struct(">IH")

_DONE: Final = int(ReplyFlag.DONE)
_DF: Final = int(CommandFlag.DF)

Parts = list[Buffer]
Answer = list[tuple[Context, list[Extent]]]
"""Of a BLOCK_STATUS: the descriptors of each context."""


class Replies(Protocol):
    """What a request is answered with."""

    def done(self, request: Request) -> Parts:
        """It succeeded, and there is nothing to tell."""

    def data(self, request: Request, data: Buffer) -> Parts:
        """A read found this, all that was asked for."""

    def status(self, request: Request, answer: Answer) -> Parts:
        """A BLOCK_STATUS found this, in each of the contexts that were asked for; there is one at least."""

    def failed(self, request: Request, refusal: Refusal) -> Parts:
        """It was refused, or failed."""


class SimpleReplies:
    """For those who negotiated nothing."""

    def done(self, request: Request) -> Parts:
        return [wire.serialize_simple_reply(request.cookie)]

    def data(self, request: Request, data: Buffer) -> Parts:
        return [wire.serialize_simple_reply(request.cookie), data]

    def status(self, request: Request, answer: Answer) -> Parts:
        raise AssertionError("no context can be selected without structured replies")

    def failed(self, request: Request, refusal: Refusal) -> Parts:
        return [wire.serialize_simple_reply(request.cookie, refusal.error)]


class StructuredReplies:
    """Chunks with compact headers."""

    _status_type = ReplyType.BLOCK_STATUS

    def done(self, request: Request) -> Parts:
        return [wire.serialize_simple_reply(request.cookie)]

    def data(self, request: Request, data: Buffer) -> Parts:
        if 0 < len(data) <= BLOCK_SIZE and data[0]:  # most reads, and no block of zeroes
            return [self._data_header(request, request.offset, len(data), _DONE), data]
        found = pieces(data, request.offset)
        if not found:
            return [self._chunk(request, ReplyType.NONE, b"", 0, _DONE)]
        if len(found) == 1 and not found[0].hole:
            return [self._data_header(request, request.offset, len(data), _DONE), data]
        if len(found) > 1 and request.flags & _DF:
            return [self._data_header(request, request.offset, len(data), _DONE), data]
        parts: Parts = []
        view = memoryview(data)
        for start, end, hole in found:
            flags = _DONE if end == len(data) else 0
            if hole:
                payload = _HOLE.pack(request.offset + start, end - start)
                parts.append(self._chunk(request, ReplyType.OFFSET_HOLE, payload, 0, flags))
            else:
                parts += (self._data_header(request, request.offset + start, end - start, flags), view[start:end])
        return parts

    def status(self, request: Request, answer: Answer) -> Parts:
        last = len(answer) - 1
        return [
            self._chunk(request, self._status_type, self._descriptors(context, extents), 0, _DONE if i == last else 0)
            for i, (context, extents) in enumerate(answer)
        ]

    def failed(self, request: Request, refusal: Refusal) -> Parts:
        text = _as_string(refusal.why)
        payload = _ERROR.pack(refusal.error, len(text)) + text
        if refusal.offset is None:
            return [self._chunk(request, ReplyType.ERROR, payload, 0, _DONE)]
        return [self._chunk(request, ReplyType.ERROR_OFFSET, payload + _OFFSET.pack(refusal.offset), 0, _DONE)]

    def _descriptors(self, context: Context, extents: list[Extent]) -> bytes:
        numbers = [number for extent in extents for number in extent]
        return pack(f">I{len(numbers)}I", context.number, *numbers)

    def _data_header(self, request: Request, offset: int, length: int, flags: int) -> bytes:
        return self._chunk(request, ReplyType.OFFSET_DATA, _OFFSET.pack(offset), length, flags)

    def _chunk(self, request: Request, kind: ReplyType, payload: bytes, more_bytes: int, flags: int) -> bytes:
        """A chunk's header and the beginning of its payload; `more_bytes` of it follow."""
        length = len(payload) + more_bytes
        return _STRUCTURED.pack(wire.STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, length) + payload


class ExtendedReplies(StructuredReplies):
    """Chunks with extended headers, and nothing else."""

    _status_type = ReplyType.BLOCK_STATUS_EXT

    def _descriptors(self, context: Context, extents: list[Extent]) -> bytes:
        numbers = [number for extent in extents for number in extent]
        return pack(f">II{len(numbers)}Q", context.number, len(extents), *numbers)

    def done(self, request: Request) -> Parts:
        return [self._chunk(request, ReplyType.NONE, b"", 0, _DONE)]

    def _chunk(self, request: Request, kind: ReplyType, payload: bytes, more_bytes: int, flags: int) -> bytes:
        length = len(payload) + more_bytes
        header = _EXTENDED.pack(wire.EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, length)
        return header + payload


def replies_of(style: Style) -> Replies:
    """What makes replies of that style."""
    match style:
        case Style.SIMPLE:
            return SimpleReplies()
        case Style.STRUCTURED:
            return StructuredReplies()
        case Style.EXTENDED:
            return ExtendedReplies()


def _as_string(text: str) -> bytes:
    """For a chunk: NBD, "Conventions", limits a string and forbids NUL in it."""
    return text.replace("\0", "").encode()[: wire.MAX_STRING_BYTES].decode(errors="ignore").encode()
