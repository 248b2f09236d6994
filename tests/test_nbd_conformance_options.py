"""What the NBD text says of each option in each state, as a table, and of the flags that come of it.

Each row names the heading of doc/proto.md that it follows. The tables are written from the text, apart from those that
the server goes by; bytes are made and parsed by hand (tests/nbd_by_hand.py). `docs/nbd.md` says which choices of the
text's MAYs are ours.
"""

import asyncio
import itertools
from dataclasses import dataclass
from typing import Final

import pytest

from tests.nbd_by_hand import (
    ABORT,
    ACK,
    BEFORE,
    EXPORT_NAME,
    EXT_HEADER_REQD,
    EXTENDED,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META,
    META_CONTEXT,
    PEEK_EXPORT,
    POLICY,
    REP_INFO,
    SERVER,
    SET_META,
    STARTTLS,
    STRUCTURED,
    STYLES,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    asking,
    contexts,
    negotiating,
    replies,
    send_option,
    session,
    text,
)
from tests.nbd_serving import LIMIT_S, Served, serving

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
