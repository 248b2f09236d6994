"""The handshake: fixed newstyle, from the greeting to the transmission phase. Pure: bytes in, bytes out.

What a client may do when stands in handshake_states.py; what it is answered, in options.py. This is the stream between
them: flags, headers and data of options, however they are cut.

Invariants: no more than MAX_OPTION_BYTES of a client's data are ever held beyond what is fed at once;
longer data of an option is skipped as it arrives, up to MAX_SKIPPED_BYTES; no client sends more than
MAX_OPTIONS. A short LIST has a long answer, so no option is answered while MAX_UNSENT_BYTES of replies
wait. How long a client may take is the caller's business.
"""

from collections.abc import Callable, Mapping
from typing import Final, Generic

from nbd_server import wire
from nbd_server.access import Session
from nbd_server.exported import Catalogue, E
from nbd_server.handshake_states import TRANSITIONS, State, Step
from nbd_server.options import Options
from nbd_server.wire import Option, OptionHeader, ProtocolError

#: Room for a name of the longest kind allowed and 2,000 information requests.
MAX_OPTION_BYTES: Final = 8192
#: An option that we do not know may be long; TLS and metadata contexts stay far below this.
MAX_SKIPPED_BYTES: Final = 64 << 10
#: Clients that list ask INFO and more for each export over one connection: some thousand exports pass.
MAX_OPTIONS: Final = 16_384
#: Replies not yet taken by `data_to_send` from which on options wait; the last of them may be a whole list.
MAX_UNSENT_BYTES: Final = 64 << 10
_OPEN: Final = Session()


class Handshake(Generic[E]):
    """One client's handshake.

    Feed it with `receive_data`, send what `data_to_send` returns until that is nothing, look at `state`:
    TRANSMISSION means that `options` has the export that was chosen, and `leftover` what the client sent after its
    last option; LOOKING_UP, that `options.looking_up` is to be awaited, and then `looked_up` called; STARTING_TLS, that
    TLS is to be established, and then `tls_started` called. To hold back a client that does not read, call none.

    session: what is asked of the client, before TLS.
    """

    def __init__(self, exports: Catalogue[E], session: Session = _OPEN) -> None:
        self.state: State = State.CLIENT_FLAGS
        self._received = bytearray()
        self._exports = exports
        self._to_send = bytearray(wire.serialize_greeting())
        self.options = Options(exports, self._to_send, session)
        self._option = OptionHeader(0, 0)
        self._data = b""
        """Of the option that waits for a look-up."""
        self._skip_bytes = 0
        self._option_count = 0
        self._read: Final[Mapping[State, Callable[[], bool]]] = {
            State.CLIENT_FLAGS: self._read_client_flags,
            State.OPTION_HEADER: self._read_option_header,
            State.OPTION_DATA: self._read_option_data,
            State.SKIPPING: self._skip_option_data,
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

    def looked_up(self) -> None:
        """What the option waited for is done: go on from there."""
        assert self.state is State.LOOKING_UP
        data, self._data = self._data, b""
        try:
            self._move(self.options.answer(self._option.option, data, looked_up=True))
        except ProtocolError:
            self._move(Step.ENDED)
        self._advance()

    def tls_started(self, session: Session) -> None:
        """What the client says from here on is under TLS; all that was agreed on before is forgotten.

        Its flags stay: a client does not say them again.
        """
        before, self.options = self.options, Options(self._exports, self._to_send, session)
        self.options.zeroes, self.options.fixed = before.zeroes, before.fixed
        self._move(Step.TLS_STARTED)

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
        flags = wire.parse_client_flags(data)
        self.options.zeroes, self.options.fixed = not flags & wire.NO_ZEROES, bool(flags & wire.FIXED_NEWSTYLE)
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
        self._move(self.options.answer(self._option.option, data))
        if self.state is State.STARTING_TLS and self._received:
            # Said in plain, and maybe by somebody in between: it must never be taken for what comes under TLS.
            raise ProtocolError(f"{len(self._received)} bytes in plain behind STARTTLS")
        if self.state is State.LOOKING_UP:
            self._data = data
        return True

    def _skip_option_data(self) -> bool:
        count = min(self._skip_bytes, len(self._received))
        del self._received[:count]
        self._skip_bytes -= count
        if self._skip_bytes:
            return False
        self._move(self.options.refuse_length(self._option.option, MAX_OPTION_BYTES))
        return True
