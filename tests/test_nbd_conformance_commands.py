"""What the NBD text says of each command with each flag, of lengths and of errors, as tables, asked of the server.

Written from the text, as test_nbd_conformance_options is.
"""

import asyncio
import itertools
import struct
from collections.abc import Iterator, Mapping
from typing import Final

import pytest

from blockstore.units import BLOCK_SIZE, MIB
from tests.nbd_by_hand import (
    BLOCK_STATUS,
    CACHE,
    DF,
    EINVAL,
    ENOSPC,
    ENOTSUP,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    OK,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    STYLES,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    payload_of,
    session,
)
from tests.nbd_chunks import Chunk, read_from
from tests.nbd_serving import SIZE, serving

#: Request types and Command flags: what each command may have, by style.
ALLOWED: Final[Mapping[int, Mapping[str, int]]] = {
    READ: {"simple": FUA, "structured": FUA | DF, "extended": FUA | DF},
    WRITE: {"simple": FUA, "structured": FUA, "extended": FUA | PAYLOAD_LEN},
    FLUSH: dict.fromkeys(STYLES, FUA),
    TRIM: dict.fromkeys(STYLES, FUA),
    CACHE: dict.fromkeys(STYLES, FUA),
    WRITE_ZEROES: dict.fromkeys(STYLES, FUA | NO_HOLE | FAST_ZERO),
    BLOCK_STATUS: {"simple": -1, "structured": FUA | REQ_ONE, "extended": FUA | REQ_ONE},
}
"""-1: none at all; the command is not there. A payload of BLOCK_STATUS has tests of its own."""
UNKNOWN_COMMANDS: Final = (8, 9, 255, 65535)
FLAGS: Final = tuple(1 << bit for bit in range(16))


def every_request(style: str) -> Iterator[tuple[int, int, int]]:
    """Command, flags, and the error that the text wants."""
    for command in (*ALLOWED, *UNKNOWN_COMMANDS):
        allowed = ALLOWED.get(command, {}).get(style, -1)
        needed = PAYLOAD_LEN if (command, style) == (WRITE, "extended") else 0
        for flags in (0, *FLAGS, *(a | b for a, b in itertools.combinations(FLAGS[:6], 2))):
            if command == BLOCK_STATUS and flags & PAYLOAD_LEN and style == "extended":
                continue
            good = allowed >= 0 and not flags & ~allowed and flags & needed == needed
            yield command, flags, OK if good else EINVAL


@pytest.mark.parametrize("style", STYLES)
def test_every_command_with_every_flag(style: str) -> None:
    """Each gets one reply of its own, in the style agreed on; a refused payload is consumed."""

    async def main() -> None:
        async with serving() as served:
            queries = () if style == "simple" else ("base:allocation",)
            client = await session(served, style, *queries)
            for command, flags, error in every_request(style):
                length = 0 if command == FLUSH else BLOCK_SIZE
                if not length and flags & PAYLOAD_LEN:
                    length = BLOCK_SIZE
                payload = payload_of(style, command, flags, length)
                client.send(command, flags, 0, length, payload)
                if command == READ and not error and style == "simple":
                    assert (await client.raw.reply(length)) == (OK, 7)
                    continue
                chunks = await client.reply()
                assert {chunk.cookie for chunk in chunks} == {7}
                assert chunks[-1].error == error, (style, command, flags, chunks)
                if style == "extended":
                    assert {chunk.offset for chunk in chunks} == {0}
                if error and style != "simple":
                    assert chunks[-1].payload[6:].decode(), "errors have words"

    asyncio.run(main())


#: Error values: command, flags, offset, length, error; on an export of SIZE bytes.
RANGES: Final = (
    (READ, 0, SIZE - 1, 1, OK),
    (READ, 0, SIZE, 1, EINVAL),
    (READ, 0, (1 << 64) - 1, 1, EINVAL),
    (READ, 0, 0, 32 * MIB + 1, EINVAL),
    (READ, 0, 0, 0, OK),
    (WRITE, 0, SIZE - 1, 2, ENOSPC),
    (WRITE, 0, SIZE, 0, OK),
    (TRIM, 0, 1, SIZE, EINVAL),
    (TRIM, 0, 0, SIZE, OK),
    (CACHE, 0, 1, SIZE, EINVAL),
    (CACHE, 0, 0, SIZE, OK),
    (WRITE_ZEROES, 0, 1, SIZE, ENOSPC),
    (WRITE_ZEROES, 0, 0, SIZE, OK),
    (WRITE_ZEROES, FAST_ZERO, 0, SIZE, OK),
    (WRITE_ZEROES, FAST_ZERO, 1, BLOCK_SIZE, ENOTSUP),
    (WRITE_ZEROES, 0, 1, BLOCK_SIZE, OK),
    (FLUSH, 0, 1, 0, EINVAL),
    (FLUSH, 0, 0, 1, EINVAL),
    (BLOCK_STATUS, 0, 0, SIZE, OK),
    (BLOCK_STATUS, 0, 1, SIZE, EINVAL),
    (BLOCK_STATUS, 0, 0, 0, EINVAL),
)


@pytest.mark.parametrize("style", STYLES)
def test_ranges_and_errors(style: str) -> None:
    """Also where the request crosses the end: ERROR_OFFSET says where."""

    async def main() -> None:
        async with serving() as served:
            queries = () if style == "simple" else ("base:allocation",)
            client = await session(served, style, *queries)
            for command, given, offset, length, wanted in RANGES:
                error = EINVAL if (style, command) == ("simple", BLOCK_STATUS) else wanted
                flags = given | (PAYLOAD_LEN if command == WRITE and length and style == "extended" else 0)
                if command == WRITE and not length and style == "extended":
                    continue
                client.send(command, flags, offset, length, payload_of(style, command, flags, length))
                if command == READ and not error and style == "simple":
                    assert (await client.raw.reply(length))[0] == OK
                    continue
                (*_, last) = await client.reply()
                assert last.error == error, (style, command, offset, length, last)
                if last.kind == Chunk.ERROR_OFFSET:
                    at = int.from_bytes(last.payload[-8:], "big")
                    assert offset <= at < offset + length
                    assert at >= SIZE

    asyncio.run(main())


@pytest.mark.parametrize("style", STYLES)
def test_a_read_only_export_changes_by_nothing(style: str) -> None:
    """Error values: EPERM; its payload is consumed."""

    async def main() -> None:
        async with serving() as served:
            client = await session(served, style, name="fixed")
            for command in (WRITE, TRIM, WRITE_ZEROES):
                flags = PAYLOAD_LEN if command == WRITE and style == "extended" else 0
                payload = payload_of(style, command, flags, BLOCK_SIZE)
                (reply,) = await client.do(command, flags, 0, BLOCK_SIZE, payload)
                assert reply.error == EPERM
            (reply,) = await client.do(FLUSH, 0, 0, 0)
            assert reply.error == OK

    asyncio.run(main())


@pytest.mark.parametrize("style", STYLES[1:])
def test_reads_in_chunks(style: str) -> None:
    """Structured reply types: holes are told as such, DF allows one chunk, and all adds up."""

    async def main() -> None:
        async with serving() as served:
            client = await session(served, style)
            content = bytearray(20 * BLOCK_SIZE)
            for block, byte in ((1, b"a"), (2, b"b"), (7, b"c"), (19, b"d")):
                content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = byte * BLOCK_SIZE
            served.volume.contents[: len(content)] = bytes(content)
            for offset, length in ((0, len(content)), (0, 1), (4095, 2), (100, 50_000), (3 * BLOCK_SIZE, BLOCK_SIZE)):
                for flags in (0, DF):
                    chunks = await client.do(READ, flags, offset, length)
                    assert read_from(chunks, offset, length) == content[offset : offset + length]
                    assert flags == 0 or len(chunks) == 1
            kinds = [chunk.kind for chunk in await client.do(READ, 0, 0, len(content))]
            assert kinds == [Chunk.OFFSET_HOLE, Chunk.OFFSET_DATA] * 3

    asyncio.run(main())


def test_a_payload_that_is_far_too_long_ends_the_session() -> None:
    """NBD, "Request message": beyond the maximum, a server should disconnect; below it consumes what it refuses."""

    async def main() -> None:
        async with serving() as served:
            client = await session(served, "extended")
            client.send(READ, PAYLOAD_LEN, 0, 32 * MIB + 1)
            assert await client.raw.ended() == b""
            client = await session(served, "extended")
            (reply,) = await client.do(READ, PAYLOAD_LEN, 0, MIB, b"r" * MIB)
            assert reply.error == EINVAL
            client.raw.send(struct.pack(">IHHQQI", 0x25609513, 0, FLUSH, 1, 0, 0) + bytes(4))
            assert await client.raw.ended() == b"", "a compact header is none here"

    asyncio.run(main())
