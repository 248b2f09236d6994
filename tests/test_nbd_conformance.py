"""What the NBD text says of each option in each state and each command with each flag, as tables, asked of the server.

Each row names the heading of doc/proto.md that it follows. The tables are written from the text, apart from those that
the server goes by; bytes are made and parsed by hand (tests/nbd_chunks.py). `docs/nbd.md` says which choices of the
text's MAYs are ours.
"""

import asyncio
import itertools
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import pytest

from blockstore.units import BLOCK_SIZE, MIB
from tests.nbd_chunks import Chunk, header_bytes, parse_header, read_from
from tests.nbd_serving import LIMIT_S, SIZE, Raw, Served, serving

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
CLOSED: Final = "closed"
ALL: Final = tuple(BEFORE)
CHUNKS: Final = ALL[1:]


@dataclass(frozen=True)
class Asked:
    """An option in these states. replies: their types, those of one type as one; CLOSED: dropped without a word."""

    heading: str
    states: tuple[str, ...]
    option: int
    data: bytes
    replies: tuple[int, ...] | str


OPTIONS: Final = (
    Asked("Option types, EXPORT_NAME: unknown, must terminate", ALL, EXPORT_NAME, b"nobody", CLOSED),
    Asked("Conventions: a string has no NUL", ALL, EXPORT_NAME, b"di\0sk", CLOSED),
    Asked("Conventions: a string is UTF-8", ALL, EXPORT_NAME, b"\xff\xfe", CLOSED),
    Asked(
        "Option types, EXTENDED_HEADERS: no EXPORT_NAME after it", ("extended", "both"), EXPORT_NAME, b"disk", CLOSED
    ),
    Asked("Option types, ABORT: must reply ACK", ALL, ABORT, b"", (ACK,)),
    Asked("Option types, ABORT: data should be ignored", ALL, ABORT, b"why not", (ACK,)),
    Asked("Option types, LIST", ALL, LIST, b"", (SERVER, ACK)),
    Asked("Option types, LIST: data is INVALID", ALL, LIST, b"x", (INVALID,)),
    Asked("Option types, PEEK_EXPORT: withdrawn", ALL, PEEK_EXPORT, b"", (UNSUP,)),
    Asked("NOTLS mode: POLICY or UNSUP", ALL, STARTTLS, b"", (POLICY,)),
    Asked("Option types, INFO", ALL, INFO, asking("disk"), (REP_INFO, ACK)),
    Asked("Option types, INFO: what is not understood is ignored", ALL, INFO, asking("disk", 3, 99), (REP_INFO, ACK)),
    Asked("Option types, INFO: the default export", ALL, INFO, asking(""), (UNKNOWN,)),
    Asked("Option types, INFO: unknown", ALL, INFO, asking("nobody"), (UNKNOWN,)),
    Asked("Option reply types, INVALID: lengths", ALL, INFO, asking("disk")[:-1], (INVALID,)),
    Asked("Option types, INFO: the name's length", ALL, INFO, b"\xff\xff\xff\xff" + bytes(2), (INVALID,)),
    Asked("Option types, GO: unknown", ALL, GO, asking("nobody"), (UNKNOWN,)),
    Asked("Option types, GO: malformed", ALL, GO, b"", (INVALID,)),
    Asked("Option types, STRUCTURED_REPLY", ("nothing", "structured", "contexts"), STRUCTURED, b"", (ACK,)),
    Asked(
        "Option types, STRUCTURED_REPLY: extended go first", ("extended", "both"), STRUCTURED, b"", (EXT_HEADER_REQD,)
    ),
    Asked("Option types, STRUCTURED_REPLY: data is INVALID", ALL, STRUCTURED, b"x", (INVALID,)),
    Asked("Option types, EXTENDED_HEADERS", ALL, EXTENDED, b"", (ACK,)),
    Asked("Option types, EXTENDED_HEADERS: data is INVALID", ALL, EXTENDED, b"x", (INVALID,)),
    Asked("Option types, LIST_META_CONTEXT: not yet", ("nothing",), LIST_META, contexts("disk"), (INVALID,)),
    Asked("Option types, LIST_META_CONTEXT: no query, all", CHUNKS, LIST_META, contexts("disk"), (META_CONTEXT, ACK)),
    Asked("The base: namespace: a wildcard lists", CHUNKS, LIST_META, contexts("disk", "base:"), (META_CONTEXT, ACK)),
    Asked("The base: namespace: unknown leaf", CHUNKS, LIST_META, contexts("disk", "base:nothing"), (ACK,)),
    Asked("LIST_META_CONTEXT: unknown namespace", CHUNKS, LIST_META, contexts("disk", "x-ours:a"), (ACK,)),
    Asked("LIST_META_CONTEXT: no colon", CHUNKS, LIST_META, contexts("disk", "base"), (INVALID,)),
    Asked("LIST_META_CONTEXT: a query beyond the data", CHUNKS, LIST_META, contexts("disk", "base:")[:-1], (INVALID,)),
    Asked(
        "LIST_META_CONTEXT: fewer queries than said", CHUNKS, LIST_META, text("disk") + b"\xff\xff\xff\xff", (INVALID,)
    ),
    Asked("LIST_META_CONTEXT: unknown export", CHUNKS, LIST_META, contexts("nobody"), (UNKNOWN,)),
    Asked("Option types, SET_META_CONTEXT: not yet", ("nothing",), SET_META, contexts("disk", "base:"), (INVALID,)),
    Asked("SET_META_CONTEXT: no query, none", CHUNKS, SET_META, contexts("disk"), (ACK,)),
    Asked("SET_META_CONTEXT", CHUNKS, SET_META, contexts("disk", "base:allocation"), (META_CONTEXT, ACK)),
    Asked("The base: namespace: a wildcard selects nothing", CHUNKS, SET_META, contexts("disk", "base:"), (ACK,)),
    Asked("SET_META_CONTEXT: unknown", CHUNKS, SET_META, contexts("disk", "x:y", "qemu:dirty-bitmap:a"), (ACK,)),
    Asked("SET_META_CONTEXT: no namespace", CHUNKS, SET_META, contexts("disk", ":leaf"), (INVALID,)),
    Asked("SET_META_CONTEXT: malformed", CHUNKS, SET_META, b"\0", (INVALID,)),
    Asked("Option reply types, UNSUP", ALL, 12, b"anything", (UNSUP,)),
    Asked("Option reply types, UNSUP", ALL, 0, b"", (UNSUP,)),
    Asked("Option reply types, UNSUP", ALL, (1 << 32) - 1, bytes(9000), (UNSUP,)),
    Asked("Option reply types, TOO_BIG", ALL, INFO, bytes(9000), (TOO_BIG,)),
)


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


def runs(kinds: list[int]) -> tuple[int, ...]:
    return tuple(kind for kind, _ in itertools.groupby(kinds))


def test_every_option_in_every_state() -> None:
    """And where the session goes on, that it does: the next option is answered."""

    async def ask(served: Served, asked: Asked, state: str) -> None:
        raw = await negotiating(served, state)
        await send_option(raw, asked.option, asked.data)
        if asked.replies == CLOSED:
            assert await raw.ended() == b"", (asked, state)
            return
        told = await replies(raw, asked.option)
        assert runs([kind for kind, _ in told]) == asked.replies, (asked, state, told)
        assert all(data.decode() for kind, data in told if kind >> 31), "errors have words"
        if asked.option == ABORT:
            assert await raw.ended() == b""
            return
        await send_option(raw, LIST, b"")
        assert (await replies(raw, LIST))[-1][0] == ACK
        raw.reset()

    async def main() -> None:
        async with serving() as served:
            async with asyncio.timeout(4 * LIMIT_S):
                for asked in OPTIONS:
                    await asyncio.gather(*(ask(served, asked, state) for state in asked.states))

    asyncio.run(main())


# ---- terms: which flags and contexts hold for requests


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


@pytest.mark.parametrize("read_only", [False, True])
def test_flags_say_what_was_negotiated(read_only: bool) -> None:
    """Transmission flags: DF only with chunks, the status payload only with extended headers and contexts."""
    always = 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 10
    changing = (1 << 1) if read_only else (1 << 5 | 1 << 6 | 1 << 11)
    by_style = {"simple": 0, "structured": 1 << 7, "extended": 1 << 7 | 1 << 12}

    async def main() -> None:
        async with serving() as served:
            for style in STYLES:
                queries = () if style == "simple" else ("base:allocation",)
                found = await session(served, style, *queries, name="fixed" if read_only else "disk")
                assert found.flags == always | changing | by_style[style], style
            assert not (await session(served, "extended")).flags >> 12 & 1, "no contexts, no payload that names them"

    asyncio.run(main())


# ---- commands

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


def payload_of(style: str, command: int, flags: int, length: int) -> bytes:
    """NBD, "Request message": what says that a payload follows."""
    follows = flags & PAYLOAD_LEN if style == "extended" else command == WRITE
    return b"p" * length if follows else b""


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


# ---- block status


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
