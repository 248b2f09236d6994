"""The handshake, by its bytes and by its table, without a socket."""

import asyncio
import itertools
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_server import handshake, wire
from nbd_server.handshake import Handshake
from nbd_server.handshake_states import TRANSITIONS, State, Step
from nbd_server.wire import Info, InfoQuery, Option, OptionReply

FIXED = wire.FIXED_NEWSTYLE.to_bytes(4, "big")
FIXED_NO_ZEROES = wire.HANDSHAKE_FLAGS.to_bytes(4, "big")
READ_ONLY_FLAGS = 0x50F
WRITABLE_FLAGS = 0xD6D


@dataclass
class Named:
    name: str
    size_bytes: int = 1 << 30
    description: str = ""
    read_only: bool = False
    client: str = ""
    aliases: tuple[str, ...] = ()
    shared: bool = True
    snapshots: dict[str, str] = field(default_factory=dict)


class Names:
    """Two exports; the first is the default one."""

    def __init__(self, *exports: Named) -> None:
        self.exports = exports or (Named("vol-1", description="a disk"), Named("ro", 4096, read_only=True))

    def find(self, name: str) -> Named | None:
        return next((export for export in self.exports if name in ("", export.name)), None)

    def why_not(self, name: str) -> str:
        return f"no {name}"

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        return None

    def __iter__(self) -> Iterator[Named]:
        return iter(self.exports)


class Elsewhere(Names):
    """Knows an export only once it was looked up."""

    def __init__(self) -> None:
        super().__init__(Named("here"))
        self.asked: list[str] = []

    def look_up(self, name: str, *, snapshots: bool = False) -> Awaitable[None] | None:
        self.asked.append(name)
        return asyncio.sleep(0) if name == "far" else None


class Reply(NamedTuple):
    option: int
    kind: int
    data: bytes


def begin(flags: bytes = FIXED_NO_ZEROES, names: Names | None = None) -> Handshake[Named]:
    """A handshake after greeting and client flags."""
    shaken = Handshake(names or Names())
    assert shaken.data_to_send() == wire.serialize_greeting()
    shaken.receive_data(flags)
    return shaken


def drain(shaken: Handshake[Named]) -> bytes:
    return b"".join(iter(shaken.data_to_send, b""))


def parse_replies(data: bytes) -> list[Reply]:
    replies = []
    while data:
        assert data[:8] == wire.OPTION_REPLY_MAGIC.to_bytes(8, "big")
        option, kind, length = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12, 16))
        replies.append(Reply(option, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return replies


def ask(shaken: Handshake[Named], option: int, data: bytes = b"") -> list[Reply]:
    shaken.receive_data(wire.serialize_option(option, data))
    return parse_replies(drain(shaken))


def query(name: str, *items: int) -> bytes:
    return wire.serialize_info_query(InfoQuery(name, items))


def test_export_name_without_and_with_padding() -> None:
    for flags, padding in ((FIXED_NO_ZEROES, 0), (FIXED, 124)):
        shaken = begin(flags)
        shaken.receive_data(wire.serialize_option(Option.EXPORT_NAME, b"vol-1"))
        assert drain(shaken) == (1 << 30).to_bytes(8, "big") + WRITABLE_FLAGS.to_bytes(2, "big") + bytes(padding)
        assert shaken.state is State.TRANSMISSION
        assert shaken.options.chosen == Names().exports[0]


@pytest.mark.parametrize("name", [b"nobody", b"\xff", b"n" * 5000, b"n" * 9000])
def test_export_name_that_fails_drops_the_client_without_a_word(name: bytes) -> None:
    shaken = begin()
    shaken.receive_data(wire.serialize_option(Option.EXPORT_NAME, name))
    assert drain(shaken) == b""
    assert shaken.state is State.CLOSED


def test_go_tells_all_that_was_asked_and_ends_the_handshake() -> None:
    shaken = begin()
    replies = ask(shaken, Option.GO, query("vol-1", Info.BLOCK_SIZE, Info.NAME, Info.DESCRIPTION, 77, Info.NAME))
    assert [reply.kind for reply in replies] == [OptionReply.INFO] * 4 + [OptionReply.ACK]
    assert {reply.option for reply in replies} == {Option.GO}
    assert [reply.data for reply in replies[:4]] == [
        bytes.fromhex("0000 0000000040000000") + WRITABLE_FLAGS.to_bytes(2, "big"),
        bytes.fromhex("0003 00000001 00001000 02000000"),
        b"\0\1vol-1",
        b"\0\2a disk",
    ]
    assert shaken.state is State.TRANSMISSION


def test_info_tells_the_same_and_goes_on() -> None:
    shaken = begin()
    asked = query("", Info.NAME)
    told = ask(shaken, Option.INFO, asked)
    assert shaken.state is State.OPTION_HEADER
    assert told[1].data == b"\0\1vol-1", "the default export is told by its own name"
    assert [reply[1:] for reply in ask(shaken, Option.GO, asked)] == [reply[1:] for reply in told]
    assert shaken.options.chosen is not None


def test_a_read_only_export_offers_no_change() -> None:
    told = ask(begin(), Option.INFO, query("ro"))[0].data
    assert told == bytes.fromhex("0000 0000000000001000") + READ_ONLY_FLAGS.to_bytes(2, "big")


def test_list_tells_all_exports() -> None:
    shaken = begin()
    replies = ask(shaken, Option.LIST)
    assert replies == [
        Reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\5vol-1a disk"),
        Reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\2ro"),
        Reply(Option.LIST, OptionReply.ACK, b""),
    ]
    assert shaken.state is State.OPTION_HEADER


@pytest.mark.parametrize(
    ("option", "data", "error"),
    [
        (Option.LIST, b"x", OptionReply.ERR_INVALID),
        (Option.GO, b"", OptionReply.ERR_INVALID),
        (Option.GO, query("vol-1")[:-1], OptionReply.ERR_INVALID),
        (Option.GO, b"\xff\xff\xff\xff" + query("vol-1")[4:], OptionReply.ERR_INVALID),
        (Option.INFO, query("nobody"), OptionReply.ERR_UNKNOWN),
        (Option.GO, query("nobody"), OptionReply.ERR_UNKNOWN),
        (Option.INFO, bytes(20_000), OptionReply.ERR_TOO_BIG),
        (Option.STARTTLS, b"", OptionReply.ERR_POLICY),
        (0xFFFFFFFF, bytes(64 << 10), OptionReply.ERR_UNSUP),
    ],
)
def test_what_is_refused_is_answered_and_the_next_option_is_understood(
    option: int, data: bytes, error: OptionReply
) -> None:
    shaken = begin()
    replies = ask(shaken, option, data)
    assert [(reply.option, reply.kind) for reply in replies] == [(option, error)]
    assert replies[0].data.decode()
    assert shaken.state is State.OPTION_HEADER
    assert ask(shaken, Option.GO, query("vol-1"))[-1].kind == OptionReply.ACK


def test_abort_is_answered_before_the_end() -> None:
    shaken = begin()
    assert ask(shaken, Option.ABORT) == [Reply(Option.ABORT, OptionReply.ACK, b"")]
    assert shaken.state is State.CLOSED
    assert ask(shaken, Option.LIST) == [], "nothing after it counts"


def test_an_option_longer_than_is_skipped_ends_it_before_its_data_comes() -> None:
    shaken = begin()
    header = wire.serialize_option(9, bytes(handshake.MAX_SKIPPED_BYTES + 1))[: wire.OPTION_HEADER_BYTES]
    shaken.receive_data(header)
    assert shaken.state is State.CLOSED


def test_unknown_client_flags_end_it() -> None:
    assert begin(b"\0\0\0\x07").state is State.CLOSED


def test_what_follows_the_last_option_is_left_over() -> None:
    shaken = begin()
    shaken.receive_data(wire.serialize_option(Option.GO, query("vol-1")) + b"requests")
    assert shaken.leftover == b"requests"


def test_the_number_of_options_is_limited() -> None:
    shaken = begin()
    for _ in range(handshake.MAX_OPTIONS):
        shaken.receive_data(wire.serialize_option(99))
        assert drain(shaken)
    assert ask(shaken, 99) == []
    assert shaken.state is State.CLOSED


def test_replies_that_are_not_taken_hold_the_options_back() -> None:
    """A LIST of 16 bytes has an answer of 100 KiB here: a thousand of them would make 100 MiB."""
    names = Names(*(Named(f"volume-{number:05}", description="d" * 80) for number in range(1000)))
    shaken = begin(names=names)
    shaken.receive_data(wire.serialize_option(Option.LIST) * 1000)
    pieces = list(iter(shaken.data_to_send, b""))
    assert len(pieces) == 1000
    one_list = len(pieces[0])
    assert max(map(len, pieces)) <= handshake.MAX_UNSENT_BYTES + one_list
    assert len(parse_replies(b"".join(pieces[:3]))) == 3 * 1001
    assert shaken.state is State.OPTION_HEADER


def test_an_option_waits_until_its_export_is_looked_up() -> None:
    """Nothing of what follows it is looked at before it is answered; it is looked up once."""
    for found in (True, False):
        names = Elsewhere()
        shaken = begin(names=names)
        shaken.receive_data(wire.serialize_option(Option.INFO, query("far")) + wire.serialize_option(Option.LIST))
        assert (shaken.state, drain(shaken)) == (State.LOOKING_UP, b"")
        waiting = shaken.options.looking_up
        assert waiting is not None
        asyncio.run(finish(waiting))
        if found:
            names.exports += (Named("far"),)
        shaken.looked_up()
        replies = parse_replies(drain(shaken))
        answer = [OptionReply.INFO, OptionReply.ACK] if found else [OptionReply.ERR_UNKNOWN]
        assert [reply.kind for reply in replies if reply.option == Option.INFO] == answer
        assert replies[-1] == Reply(Option.LIST, OptionReply.ACK, b"")
        assert (shaken.state, names.asked) == (State.OPTION_HEADER, ["far"])


async def finish(waiting: Awaitable[None]) -> None:
    await waiting


def test_export_name_that_is_looked_up_in_vain_drops_the_client() -> None:
    shaken = begin(names=Elsewhere())
    shaken.receive_data(wire.serialize_option(Option.EXPORT_NAME, b"far"))
    assert shaken.state is State.LOOKING_UP
    waiting = shaken.options.looking_up
    assert waiting is not None
    asyncio.run(finish(waiting))
    shaken.looked_up()
    assert (shaken.state, drain(shaken)) == (State.CLOSED, b"")


CONVERSATION = (
    FIXED_NO_ZEROES
    + wire.serialize_option(5)
    + wire.serialize_option(Option.LIST)
    + wire.serialize_option(42, bytes(9000))
    + wire.serialize_option(Option.INFO, query("vol-1", *range(5)))
    + wire.serialize_option(Option.GO, query("ro", Info.NAME))
    + b"more"
)


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=30))
def test_pieces_of_any_size_make_the_same_conversation(cuts: list[int]) -> None:
    whole, pieces = Handshake(Names()), Handshake(Names())
    whole.receive_data(CONVERSATION)
    edges = [0, *sorted(cuts), len(CONVERSATION)]
    answers = b""
    for start, end in itertools.pairwise(edges):
        pieces.receive_data(CONVERSATION[start:end])
        answers += pieces.data_to_send()
    assert answers + drain(pieces) == drain(whole)
    assert pieces.state is State.TRANSMISSION
    assert (pieces.options.chosen, pieces.leftover) == (Named("ro", 4096, read_only=True), b"more")


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_leave_it_in_a_state_of_the_table(data: bytes, greeted: bool) -> None:
    shaken = begin() if greeted else Handshake(Names())
    shaken.receive_data(data)
    assert shaken.state in TRANSITIONS
    drain(shaken)


OPTIONS = st.builds(
    lambda option, data, cut: wire.serialize_option(option, data)[:cut],
    st.one_of(st.sampled_from(list(Option)), st.integers(0, 20)),
    st.one_of(st.binary(max_size=30), st.just(query("vol-1", 3)), st.just(query("x"))),
    st.one_of(st.none(), st.none(), st.integers(0, 40)),
)


@given(st.lists(OPTIONS, max_size=12))
def test_any_options_get_replies_that_parse(options: list[bytes]) -> None:
    """As far as the replies are options' replies at all: EXPORT_NAME answers in a form of its own."""
    shaken = begin()
    for option in options:
        if shaken.state is not State.OPTION_HEADER or option[8:12] == b"\0\0\0\1":
            return
        before = drain(shaken)
        assert before == b""
        shaken.receive_data(option)
        for reply in parse_replies(drain(shaken)):
            assert reply.kind in list(OptionReply)


def test_every_step_that_the_table_lacks_raises() -> None:
    for state, step in itertools.product(State, Step):
        shaken = Handshake(Names())
        shaken.state = state
        if step in TRANSITIONS[state]:
            shaken._move(step)
            assert shaken.state is TRANSITIONS[state][step]
        else:
            with pytest.raises(KeyError):
                shaken._move(step)


def test_every_state_can_end() -> None:
    assert {State.CLOSED, State.TRANSMISSION} == {state for state in State if not TRANSITIONS[state]}
    for state in set(State) - {State.CLOSED, State.TRANSMISSION}:
        assert TRANSITIONS[state][Step.ENDED] is State.CLOSED
