"""A *body*: content as it lies inside the encryption, with zstd where that makes it smaller.

    offset  size
    0       1     method: 0 the content as it is, 1 one zstd frame (RFC 8878)
    1       4     size of the content in bytes
    5             the content

What claims to be large is refused before memory is taken for it: the stated size against the limit of its kind,
and the size in the zstd frame's header against the stated one. Source: docs/format.md, "Body".
"""

from typing import Final, TypeVar

import zstandard

from blockstore.errors import Corrupt

HEADER_SIZE: Final = 5
DEFAULT_LEVEL: Final = 3

Context = TypeVar("Context")

_STORED: Final = 0
_ZSTD: Final = 1


#: What zstd works with, while nobody does: to make one takes a tenth of what a frame does. One call at a time has each.
_idle_compressors: Final[dict[int, list[zstandard.ZstdCompressor]]] = {}
_idle_expanders: Final[list[zstandard.ZstdDecompressor]] = []


def compress(content: bytes, level: int = DEFAULT_LEVEL) -> bytes:
    """The body of `content`. Gives the same bytes for the same content and version of zstd."""
    idle = _idle_compressors.setdefault(level, [])
    compressor = _take(idle) or zstandard.ZstdCompressor(level=level, write_checksum=False)
    packed = compressor.compress(content)
    idle.append(compressor)
    size = len(content).to_bytes(4, "little")
    if len(packed) < len(content):
        return bytes((_ZSTD,)) + size + packed
    return bytes((_STORED,)) + size + content


def expand(body: bytes | memoryview, limit: int, what: str) -> bytes:
    """The content of `body`, at most `limit` bytes. Raises Corrupt; `what` names the object there."""
    if len(body) < HEADER_SIZE:
        raise Corrupt(f"{what} has a body of {len(body)} bytes: a whole one has at least {HEADER_SIZE}")
    method, size = body[0], int.from_bytes(body[1:HEADER_SIZE], "little")
    if size > limit:
        raise Corrupt(f"{what} claims {size} bytes of content: at most {limit} are allowed")
    rest = memoryview(body)[HEADER_SIZE:]
    if method == _STORED:
        content = bytes(rest)
    elif method == _ZSTD:
        content = _decompress(rest, size, what)
    else:
        raise Corrupt(f"{what} is compressed by method {method}, which this version does not know")
    if len(content) != size:
        raise Corrupt(f"{what} holds {len(content)} bytes of content where it claims {size}")
    return content


def _decompress(packed: memoryview, size: int, what: str) -> bytes:
    try:
        stated = zstandard.get_frame_parameters(packed).content_size
        if stated != size:
            raise Corrupt(f"{what} has a zstd frame of {stated} bytes where it claims {size}")
        expander = _take(_idle_expanders) or zstandard.ZstdDecompressor()
        content = expander.decompress(packed, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Corrupt(f"{what} does not decompress: {error}") from error
    _idle_expanders.append(expander)
    return content


def _take(idle: list[Context]) -> Context | None:
    """One that nobody has; several threads may ask at once."""
    try:
        return idle.pop()
    except IndexError:
        return None
