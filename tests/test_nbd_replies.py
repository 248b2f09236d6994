"""Replies by their bytes, as the NBD text has them, and put together again by a client written from it."""

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.units import BLOCK_SIZE
from nbd_server.replies import ExtendedReplies, Parts, SimpleReplies, StructuredReplies, replies_of
from nbd_server.terms import Style
from nbd_server.transmission import Refusal, Request
from nbd_server.wire import Command, CommandFlag, WireError
from tests.nbd_chunks import Chunk, parse_chunks, read_from

COOKIE = 0x0102030405060708
READ = Request(Command.READ, 0, COOKIE, BLOCK_SIZE, 4)


def joined(parts: Parts) -> bytes:
    return b"".join(parts)


def test_simple_replies() -> None:
    made = SimpleReplies()
    assert joined(made.done(READ)) == bytes.fromhex("67446698 00000000 0102030405060708")
    assert joined(made.data(READ, b"data")) == bytes.fromhex("67446698 00000000 0102030405060708") + b"data"
    assert joined(made.failed(READ, Refusal(5, "why"))) == bytes.fromhex("67446698 00000005 0102030405060708")


def test_structured_replies() -> None:
    made = StructuredReplies()
    assert joined(made.done(READ)) == bytes.fromhex("67446698 00000000 0102030405060708")
    assert joined(made.data(READ, b"data")) == (
        bytes.fromhex("668e33ef 0001 0001 0102030405060708 0000000c 0000000000001000") + b"data"
    )
    assert joined(made.data(READ, bytes(4))) == bytes.fromhex(
        "668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000004"
    )
    assert joined(made.data(replace(READ, length=0), b"")) == bytes.fromhex(
        "668e33ef 0001 0000 0102030405060708 00000000"
    )
    assert joined(made.failed(READ, Refusal(5, "why"))) == (
        bytes.fromhex("668e33ef 0001 8001 0102030405060708 00000009 00000005 0003") + b"why"
    )
    assert joined(made.failed(READ, Refusal(22, "", 4097))) == bytes.fromhex(
        "668e33ef 0001 8002 0102030405060708 0000000e 00000016 0000 0000000000001001"
    )


def test_extended_replies() -> None:
    made = ExtendedReplies()
    header = "6e8a278c 0001 {} 0102030405060708 0000000000001000 {}"
    assert joined(made.done(READ)) == bytes.fromhex(header.format("0000", "0000000000000000"))
    assert joined(made.data(READ, b"data")) == (
        bytes.fromhex(header.format("0001", "000000000000000c") + "0000000000001000") + b"data"
    )
    assert joined(made.failed(READ, Refusal(5, "why"))) == (
        bytes.fromhex(header.format("8001", "0000000000000009") + "00000005 0003") + b"why"
    )


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_words_are_a_string_of_the_text(style: Style) -> None:
    """At most 4,096 bytes, whole characters, no NUL (NBD, "Conventions")."""
    (chunk,) = parse_chunks(joined(replies_of(style).failed(READ, Refusal(WireError.EIO, "\0" + "ä" * 5000))))
    length = struct.unpack(">H", chunk.payload[4:6])[0]
    assert (length, chunk.payload[6:].decode()) == (4096, "ä" * 2048)


@given(
    st.lists(st.sampled_from([b"", b"x", b"x" * BLOCK_SIZE]), max_size=8),
    st.integers(0, 5000),
    st.integers(0, 2 * BLOCK_SIZE),
    st.booleans(),
    st.sampled_from([Style.STRUCTURED, Style.EXTENDED]),
)
def test_chunks_make_up_what_was_read(blocks: list[bytes], cut: int, offset: int, df: bool, style: Style) -> None:
    """NBD, "Request types", NBD_CMD_READ: chunks cover the request once, and DF allows one with content."""
    data = b"".join(block.ljust(BLOCK_SIZE, b"\0") for block in blocks)[cut:]
    request = Request(Command.READ, CommandFlag.DF if df else 0, 7, offset, len(data))
    parts = replies_of(style).data(request, memoryview(data))
    chunks = parse_chunks(joined(parts))
    assert read_from(chunks, offset, len(data)) == data
    assert all(chunk.cookie == 7 for chunk in chunks)
    if df:
        assert len(chunks) == 1
    sent = sum(len(chunk.payload) - 8 for chunk in chunks if chunk.kind == Chunk.OFFSET_DATA)
    if not df and not offset % BLOCK_SIZE and not cut:
        assert sent == sum(BLOCK_SIZE for block in blocks if block), "no block of zeroes is sent"


def test_large_data_is_handed_on_as_it_is() -> None:
    data = bytearray(b"x" * 4 * BLOCK_SIZE)
    data[BLOCK_SIZE : 2 * BLOCK_SIZE] = bytes(BLOCK_SIZE)
    parts = StructuredReplies().data(Request(Command.READ, 0, 1, 0, len(data)), data)
    views = [part for part in parts if isinstance(part, memoryview)]
    assert [len(view) for view in views] == [BLOCK_SIZE, 2 * BLOCK_SIZE]
    assert all(view.obj is data for view in views)
