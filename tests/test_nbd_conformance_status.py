"""What the NBD text says of block status and its contexts, asked of the server.

Written from the text, as test_nbd_conformance_options is.
"""

import asyncio
import struct
from typing import Final

import pytest

from blockstore.units import BLOCK_SIZE, MIB
from tests.nbd_by_hand import (
    BLOCK_STATUS,
    EINVAL,
    FLUSH,
    GO,
    OK,
    PAYLOAD_LEN,
    REQ_ONE,
    SET_META,
    STYLES,
    Session,
    asking,
    contexts,
    negotiating,
    replies,
    send_option,
    session,
)
from tests.nbd_chunks import Chunk
from tests.nbd_serving import SIZE, serving


def descriptors(chunk: Chunk, *, extended: bool) -> tuple[int, list[tuple[int, int]]]:
    """The context's number, and length and flags of each."""
    if not extended:
        assert chunk.kind == Chunk.BLOCK_STATUS
        numbers = struct.unpack(f">{len(chunk.payload) // 4}I", chunk.payload)
        rest = numbers[1:]
    else:
        assert chunk.kind == Chunk.BLOCK_STATUS_EXT
        number, count = struct.unpack(">II", chunk.payload[:8])
        rest = struct.unpack(f">{2 * count}Q", chunk.payload[8:])
        numbers = (number,)
    assert rest, "one at least"
    assert all(length for length in rest[::2])
    return numbers[0], list(zip(rest[::2], rest[1::2], strict=True))


@pytest.mark.parametrize("style", STYLES[1:])
def test_block_status(style: str) -> None:
    """Request types, BLOCK_STATUS: one chunk a context, merged descriptors inside the request, REQ_ONE just one."""
    names = ("base:allocation", "qemu:allocation-depth", "cairn:hydrated")

    async def main() -> None:
        async with serving() as served:
            client = await session(served, style, *names)
            served.volume.contents[BLOCK_SIZE : 3 * BLOCK_SIZE] = b"x" * 2 * BLOCK_SIZE
            chunks = await client.do(BLOCK_STATUS, 0, 100, MIB)
            told = dict(descriptors(chunk, extended=client.extended) for chunk in chunks)
            allocation, depth, here = (told[number] for number in client.numbers)
            assert allocation == [(3996, 3), (2 * BLOCK_SIZE, 0), (MIB + 100 - 3 * BLOCK_SIZE, 3)]
            assert depth == [(3996, 0), (2 * BLOCK_SIZE, 1), (MIB + 100 - 3 * BLOCK_SIZE, 0)]
            assert here == [(MIB, 1)]
            for chunk in await client.do(BLOCK_STATUS, REQ_ONE, 100, MIB):
                assert len(descriptors(chunk, extended=client.extended)[1]) == 1
            (one,) = [
                descriptors(chunk, extended=client.extended)
                for chunk in (await client.do(BLOCK_STATUS, REQ_ONE, 0, 5))[:1]
            ]
            assert one[1] == [(5, 3)]

    asyncio.run(main())


def test_contexts_hold_for_their_export_only() -> None:
    """Option types, SET_META_CONTEXT: the last one counts, for the export of that name, and where it did not fail."""

    async def main() -> None:
        async with serving() as served:
            for last in (
                contexts("other", "base:allocation"),
                contexts("disk"),
                b"\0",
                contexts("nobody", "base:allocation"),
            ):
                raw = await negotiating(served, "contexts")
                await send_option(raw, SET_META, last)
                await replies(raw, SET_META)
                await send_option(raw, GO, asking("disk"))
                await replies(raw, GO)
                (reply,) = await Session(raw, 0, False, ()).do(BLOCK_STATUS, 0, 0, BLOCK_SIZE)
                assert reply.error == EINVAL, last
                raw.reset()

    asyncio.run(main())


#: Request types, BLOCK_STATUS with a payload: effect length, indexes of contexts (None: an unknown one), error.
FILTERS: Final = (
    (BLOCK_SIZE, (0,), OK),
    (BLOCK_SIZE, (1, 0), OK),
    (BLOCK_SIZE, (0, 0), EINVAL),
    (BLOCK_SIZE, (0, 1, 1), EINVAL),
    (BLOCK_SIZE, (None,), EINVAL),
    (BLOCK_SIZE, (), EINVAL),
    (0, (0,), EINVAL),
    (SIZE, (0,), OK),
    (SIZE + 1, (0,), EINVAL),
    ((1 << 64) - 1, (0,), EINVAL),
)


def test_block_status_of_some_contexts() -> None:
    async def main() -> None:
        async with serving() as served:
            client = await session(served, "extended", "base:allocation", "qemu:allocation-depth")
            for length, indexes, error in FILTERS:
                numbers = [99 if index is None else client.numbers[index] for index in indexes]
                payload = struct.pack(f">Q{len(numbers)}I", length, *numbers)
                chunks = await client.do(BLOCK_STATUS, PAYLOAD_LEN, 0, len(payload), payload)
                assert chunks[-1].error == error, (length, indexes, chunks)
                if not error:
                    told = [descriptors(chunk, extended=True)[0] for chunk in chunks]
                    assert sorted(told) == sorted(numbers)
            for payload in (b"x", bytes(9), bytes(11), bytes(13), bytes(4000)):
                (reply,) = await client.do(BLOCK_STATUS, PAYLOAD_LEN, 0, len(payload), payload)
                assert reply.error == EINVAL
            (reply,) = await client.do(FLUSH, 0, 0, 0)
            assert reply.error == OK, "all payloads were consumed"

    asyncio.run(main())
