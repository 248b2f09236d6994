"""The NBD messages: what is parsed is what was serialized, and what cannot be is refused.

The bytes in these tests are written out by hand from doc/proto.md, so that a number that is wrong in
both directions does not pass.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_server import wire
from nbd_server.wire import Command, CommandFlag, Info, InfoQuery, OptionReply, TransmissionFlag, WireError

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200)


def test_the_greeting_is_the_one_of_fixed_newstyle() -> None:
    assert wire.serialize_greeting() == b"NBDMAGIC" + b"IHAVEOPT" + b"\0\x03"


def test_numbers_are_those_of_the_text() -> None:
    assert wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, 0, 0, 0, 0)[:4] == bytes.fromhex("25609513")
    assert wire.serialize_simple_reply(7, WireError.ENOSPC) == bytes.fromhex("67446698 0000001c 0000000000000007")
    assert [int(command) for command in Command] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (CommandFlag.FUA, CommandFlag.NO_HOLE) == (1, 2)
    flags = TransmissionFlag
    assert (flags.HAS_FLAGS, flags.READ_ONLY, flags.SEND_FLUSH, flags.SEND_FUA) == (1, 2, 4, 8)
    assert (flags.SEND_TRIM, flags.SEND_WRITE_ZEROES, flags.CAN_MULTI_CONN) == (32, 64, 256)
    assert OptionReply.ERR_UNSUP.value == 0x80000001
    assert OptionReply.ERR_UNKNOWN.value == 0x80000006
    assert OptionReply.ERR_TOO_BIG.value == 0x80000009
    assert sorted(WireError) == [0, 1, 5, 12, 22, 28, 75, 95, 108]


def test_an_option_reply_has_its_own_magic() -> None:
    reply = wire.serialize_option_reply(7, OptionReply.INFO, b"abc")
    assert reply == bytes.fromhex("0003e889045565a9 00000007 00000003 00000003") + b"abc"


def test_information_of_each_kind() -> None:
    assert wire.serialize_info_export(1 << 30, 0x16D) == bytes.fromhex("0000 0000000040000000 016d")
    assert wire.serialize_info_text(Info.NAME, "é") == bytes.fromhex("0001 c3a9")
    assert wire.serialize_info_text(Info.DESCRIPTION, "d") == bytes.fromhex("0002 64")
    assert wire.serialize_info_block_size(1, 4096, 1 << 25) == bytes.fromhex("0003 00000001 00001000 02000000")
    assert wire.serialize_server("ab", "cd") == bytes.fromhex("00000002") + b"abcd"
    assert wire.serialize_export(4096, 3) == bytes.fromhex("0000000000001000 0003")


@pytest.mark.parametrize("flags", range(4))
def test_client_flags_that_were_offered_are_taken(flags: int) -> None:
    assert wire.parse_client_flags(flags.to_bytes(4, "big")) == flags


@given(st.integers(min_value=4, max_value=(1 << 32) - 1))
def test_any_other_client_flag_breaks_the_protocol(flags: int) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.parse_client_flags(flags.to_bytes(4, "big"))


@given(st.integers(0, (1 << 32) - 1), st.binary(max_size=50))
def test_option_header_round_trip(option: int, data: bytes) -> None:
    message = wire.serialize_option(option, data)
    assert wire.parse_option_header(message[: wire.OPTION_HEADER_BYTES]) == (option, len(data))
    assert message[wire.OPTION_HEADER_BYTES :] == data


@given(st.integers(0, 127))
def test_a_flipped_bit_in_the_option_magic_is_seen(bit: int) -> None:
    message = bytearray(wire.serialize_option(3))
    message[bit // 8] ^= 1 << bit % 8
    if bit < 64:
        with pytest.raises(wire.ProtocolError):
            wire.parse_option_header(bytes(message))
    else:
        assert wire.parse_option_header(bytes(message)) != (3, 0)


@given(NAMES, st.lists(st.integers(0, 65535), max_size=40))
def test_info_query_round_trip(name: str, items: list[int]) -> None:
    query = InfoQuery(name, tuple(items))
    assert wire.parse_info_query(wire.serialize_info_query(query)) == query


@given(NAMES, st.lists(st.integers(0, 65535), max_size=4), st.data())
def test_an_info_query_of_another_length_is_malformed(name: str, items: list[int], data: st.DataObject) -> None:
    whole = wire.serialize_info_query(InfoQuery(name, tuple(items)))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(wire.Malformed):
        wire.parse_info_query(whole[:cut])
    with pytest.raises(wire.Malformed):
        wire.parse_info_query(whole + b"\0")


@given(st.binary(max_size=100))
def test_any_bytes_are_an_info_query_or_malformed(data: bytes) -> None:
    try:
        query = wire.parse_info_query(data)
    except wire.Malformed:
        return
    assert wire.serialize_info_query(query) == data


def test_names_that_are_none() -> None:
    assert wire.parse_name(b"n" * wire.MAX_STRING_BYTES) == "n" * wire.MAX_STRING_BYTES
    for data in (b"n" * (wire.MAX_STRING_BYTES + 1), b"\xff\xfe", b"a\0b", b"\xed\xa0\x80"):
        with pytest.raises(wire.Malformed):
            wire.parse_name(data)


@given(
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1),
)
def test_request_round_trip(command: int, flags: int, cookie: int, offset: int, length: int) -> None:
    message = wire.serialize_request(command, flags, cookie, offset, length)
    assert len(message) == 28
    assert wire.REQUEST.unpack(message) == (wire.REQUEST_MAGIC, flags, command, cookie, offset, length)
