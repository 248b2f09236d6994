"""The handshake: fixed newstyle, from the greeting to the transmission phase. Pure: bytes in, bytes out.

What a client may do when stands in `TRANSITIONS`; whatever is not there raises. A client that breaks
the protocol ends in CLOSED: what there is to send is sent, and then the connection is dropped (NBD,
"Termination of the session during option haggling").

Invariants: no more than MAX_OPTION_BYTES of a client's data are ever held beyond what is fed at once;
longer data of an option is skipped as it arrives, up to MAX_SKIPPED_BYTES; no client sends more than
MAX_OPTIONS. A short LIST has a long answer, so no option is answered while MAX_UNSENT_BYTES of replies
wait. How long a client may take is the caller's business.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from typing import Final, Generic, Protocol, TypeVar

from blockstore.units import BLOCK_SIZE, MIB
from nbd_server import wire
from nbd_server.links import parse_asked
from nbd_server.wire import Info, Malformed, Option, OptionHeader, OptionReply, ProtocolError, TransmissionFlag

#: Room for a name of the longest kind allowed and 2,000 information requests.
MAX_OPTION_BYTES: Final = 8192
#: An option that we do not know may be long; TLS and metadata contexts stay far below this.
MAX_SKIPPED_BYTES: Final = 64 << 10
#: Clients that list ask INFO and more for each export over one connection: some thousand exports pass.
MAX_OPTIONS: Final = 16_384
#: Replies not yet taken by `data_to_send` from which on options wait; the last of them may be a whole list.
MAX_UNSENT_BYTES: Final = 64 << 10

#: Any byte range is served; whole blocks are served without reading first.
MINIMUM_BLOCK_SIZE: Final = 1
PREFERRED_BLOCK_SIZE: Final = BLOCK_SIZE
#: NBD, "Block size constraints": what clients assume by default.
MAXIMUM_BLOCK_SIZE: Final = 32 * MIB


class State(Enum):
    """Where the handshake is."""

    CLIENT_FLAGS = auto()
    """Waits for the client's flags."""
    OPTION_HEADER = auto()
    """Waits for the header of an option."""
    OPTION_DATA = auto()
    """Waits for the data of an option."""
    SKIPPING = auto()
    """Drops the data of an option that is refused for its length."""
    TRANSMISSION = auto()
    """The client has chosen an export."""
    CLOSED = auto()
    """Send what is there, then drop the connection."""


class Step(Enum):
    """What moves the state."""

    FLAGS_ACCEPTED = auto()
    OPTION_BEGUN = auto()
    OPTION_TOO_LONG = auto()
    OPTION_ANSWERED = auto()
    EXPORT_CHOSEN = auto()
    ENDED = auto()


TRANSITIONS: Final[Mapping[State, Mapping[Step, State]]] = {
    State.CLIENT_FLAGS: {Step.FLAGS_ACCEPTED: State.OPTION_HEADER, Step.ENDED: State.CLOSED},
    State.OPTION_HEADER: {
        Step.OPTION_BEGUN: State.OPTION_DATA,
        Step.OPTION_TOO_LONG: State.SKIPPING,
        Step.ENDED: State.CLOSED,
    },
    State.OPTION_DATA: {
        Step.OPTION_ANSWERED: State.OPTION_HEADER,
        Step.EXPORT_CHOSEN: State.TRANSMISSION,
        Step.ENDED: State.CLOSED,
    },
    State.SKIPPING: {Step.OPTION_ANSWERED: State.OPTION_HEADER, Step.ENDED: State.CLOSED},
    State.TRANSMISSION: {},
    State.CLOSED: {},
}


class Exported(Protocol):
    """What the handshake tells of an export."""

    @property
    def name(self) -> str:
        """Its canonical name; at most MAX_STRING_BYTES in UTF-8."""

    @property
    def description(self) -> str:
        """For people; may be empty."""

    @property
    def size_bytes(self) -> int:
        """As of now; it may grow."""

    @property
    def read_only(self) -> bool:
        """Whether changes are refused."""

    @property
    def client(self) -> str:
        """The only one whose links may use it (nbd_server/links.py); empty: anyone."""


E = TypeVar("E", bound=Exported)
E_co = TypeVar("E_co", bound=Exported, covariant=True)


class Catalogue(Protocol[E_co]):
    """Where the handshake looks exports up."""

    def find(self, name: str) -> E_co | None:
        """The export of that name; "" asks for the default one."""

    def __iter__(self) -> Iterator[E_co]:
        """All exports, in the order in which LIST tells them."""


def transmission_flags(export: Exported) -> int:
    """What the export can do (NBD, "Transmission flags").

    CAN_MULTI_CONN is true: a write is acknowledged only when a quorum of replicas has it on disk, and
    one front-end orders the requests of all connections. So a flush, or FUA, on any connection covers
    what was acknowledged on every other, and each connection reads what another was told is written.
    FAST_ZERO is not advertised: the edges of an unaligned range are written like any other data.
    """
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    flags |= TransmissionFlag.CAN_MULTI_CONN
    if export.read_only:
        return flags | TransmissionFlag.READ_ONLY
    return flags | TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES


class Handshake(Generic[E]):
    """One client's handshake.

    Feed it with `receive_data`, send what `data_to_send` returns until that is nothing, look at `state`:
    TRANSMISSION means that `chosen` is the export, `client` whose link this is (or empty), and `leftover` what the
    client sent after its last option. To hold back a client that does not read, call neither.
    """

    def __init__(self, exports: Catalogue[E]) -> None:
        self.state: State = State.CLIENT_FLAGS
        self.chosen: E | None = None
        self.client = ""
        self._exports = exports
        self._received = bytearray()
        self._to_send = bytearray(wire.serialize_greeting())
        self._option = OptionHeader(0, 0)
        self._skip_bytes = 0
        self._option_count = 0
        self._zeroes = True
        self._read: Final[Mapping[State, Callable[[], bool]]] = {
            State.CLIENT_FLAGS: self._read_client_flags,
            State.OPTION_HEADER: self._read_option_header,
            State.OPTION_DATA: self._read_option_data,
            State.SKIPPING: self._skip_option_data,
        }
        self._answer: Final[Mapping[int, Callable[[bytes], Step]]] = {
            Option.EXPORT_NAME: self._answer_export_name,
            Option.ABORT: self._answer_abort,
            Option.LIST: self._answer_list,
            Option.INFO: self._answer_info,
            Option.GO: self._answer_go,
        }

    def receive_data(self, data: bytes | memoryview) -> None:
        """Take what the client sent, in pieces of any size, and go as far as it allows."""
        self._received += data
        self._advance()

    def data_to_send(self) -> bytes:
        """What is to be sent now; each byte is returned once. Options that waited for that go on."""
        data = bytes(self._to_send)
        self._to_send.clear()
        self._advance()
        return data

    @property
    def leftover(self) -> bytes:
        """In TRANSMISSION: what the client has sent beyond the handshake."""
        return bytes(self._received)

    def _advance(self) -> None:
        try:
            while len(self._to_send) < MAX_UNSENT_BYTES:
                read = self._read.get(self.state)
                if read is None or not read():
                    return
        except ProtocolError:
            self._move(Step.ENDED)

    def _move(self, step: Step) -> None:
        self.state = TRANSITIONS[self.state][step]

    def _take(self, count: int) -> bytes | None:
        """The next `count` bytes, or None while there are fewer."""
        if len(self._received) < count:
            return None
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _read_client_flags(self) -> bool:
        if (data := self._take(wire.CLIENT_FLAGS_BYTES)) is None:
            return False
        # A client that is not "fixed" only ever sends EXPORT_NAME; it needs no case of its own.
        self._zeroes = not wire.parse_client_flags(data) & wire.NO_ZEROES
        self._move(Step.FLAGS_ACCEPTED)
        return True

    def _read_option_header(self) -> bool:
        if (data := self._take(wire.OPTION_HEADER_BYTES)) is None:
            return False
        self._option = wire.parse_option_header(data)
        self._option_count += 1
        if self._option_count > MAX_OPTIONS:
            raise ProtocolError(f"more than {MAX_OPTIONS} options")
        if self._option.length <= MAX_OPTION_BYTES:
            self._move(Step.OPTION_BEGUN)
            return True
        if self._option.length > MAX_SKIPPED_BYTES or self._option.option == Option.EXPORT_NAME:
            raise ProtocolError(f"option {self._option.option} with {self._option.length} bytes of data")
        self._skip_bytes = self._option.length
        self._move(Step.OPTION_TOO_LONG)
        return True

    def _read_option_data(self) -> bool:
        if (data := self._take(self._option.length)) is None:
            return False
        answer = self._answer.get(self._option.option, self._answer_unknown)
        self._move(answer(data))
        return True

    def _skip_option_data(self) -> bool:
        count = min(self._skip_bytes, len(self._received))
        del self._received[:count]
        self._skip_bytes -= count
        if self._skip_bytes:
            return False
        if self._option.option in self._answer:
            self._refuse(OptionReply.ERR_TOO_BIG, f"at most {MAX_OPTION_BYTES} bytes of data are allowed")
        else:
            self._answer_unknown(b"")
        self._move(Step.OPTION_ANSWERED)
        return True

    def _reply(self, reply: OptionReply, data: bytes = b"") -> None:
        self._to_send += wire.serialize_option_reply(self._option.option, reply, data)

    def _refuse(self, reply: OptionReply, message: str) -> Step:
        self._reply(reply, message.encode())
        return Step.OPTION_ANSWERED

    def _answer_unknown(self, _: bytes) -> Step:
        return self._refuse(OptionReply.ERR_UNSUP, f"option {self._option.option} is not known here")

    def _answer_export_name(self, data: bytes) -> Step:
        """This option has no way to tell an error: the connection is dropped instead."""
        try:
            asked = parse_asked(wire.parse_name(data))
        except Malformed as error:
            raise ProtocolError(str(error)) from error
        export = self._exports.find(asked.export)
        if export is None or export.client not in ("", asked.client):
            raise ProtocolError("no such export")
        self._to_send += wire.serialize_export(export.size_bytes, transmission_flags(export))
        if self._zeroes:
            self._to_send += wire.EXPORT_NAME_PADDING
        self.chosen, self.client = export, asked.client
        return Step.EXPORT_CHOSEN

    def _answer_abort(self, _: bytes) -> Step:
        self._reply(OptionReply.ACK)
        return Step.ENDED

    def _answer_list(self, data: bytes) -> Step:
        if data:
            return self._refuse(OptionReply.ERR_INVALID, "LIST takes no data")
        for export in self._exports:
            self._reply(OptionReply.SERVER, wire.serialize_server(export.name, export.description))
        self._reply(OptionReply.ACK)
        return Step.OPTION_ANSWERED

    def _answer_info(self, data: bytes) -> Step:
        self._describe(data)
        return Step.OPTION_ANSWERED

    def _answer_go(self, data: bytes) -> Step:
        self.chosen = self._describe(data)
        return Step.OPTION_ANSWERED if self.chosen is None else Step.EXPORT_CHOSEN

    def _describe(self, data: bytes) -> E | None:
        """Answer INFO or GO; the export, or None where an error was the answer."""
        try:
            query = wire.parse_info_query(data)
        except Malformed as error:
            self._refuse(OptionReply.ERR_INVALID, str(error))
            return None
        asked = parse_asked(query.name)
        export = self._exports.find(asked.export)
        if export is None:
            self._refuse(OptionReply.ERR_UNKNOWN, f"no export {asked.export[:256]!r} here")
            return None
        if export.client not in ("", asked.client):
            self._refuse(OptionReply.ERR_POLICY, f"{export.name} is attached for client {export.client}")
            return None
        self.client = asked.client
        self._reply(OptionReply.INFO, wire.serialize_info_export(export.size_bytes, transmission_flags(export)))
        for item in dict.fromkeys(query.items):
            if (information := _information(export, item)) is not None:
                self._reply(OptionReply.INFO, information)
        self._reply(OptionReply.ACK)
        return export


def _information(export: Exported, item: int) -> bytes | None:
    """What the client asked to know beyond EXPORT, or None where we have nothing to say."""
    if item == Info.NAME:
        return wire.serialize_info_text(Info.NAME, export.name)
    if item == Info.DESCRIPTION and export.description:
        return wire.serialize_info_text(Info.DESCRIPTION, export.description)
    if item == Info.BLOCK_SIZE:
        return wire.serialize_info_block_size(MINIMUM_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, MAXIMUM_BLOCK_SIZE)
    return None
