"""A client's side of the handshake: fixed newstyle with GO. Pure: bytes in, bytes out.

Feed it with `receive_data`, send what `data_to_send` returns, until `agreed` is there. With TLS `must_start_tls` comes
first: then TLS is established, and `tls_started` called. What the server says is believed only as far as it fits: a
reply is bounded before it is waited for, and nothing that came in plain counts under TLS.
Source: the NBD text, "Newstyle negotiation" and "TLS support".
"""

from dataclasses import dataclass
from struct import Struct
from typing import Final

from nbd_server import wire
from nbd_server.wire import Info, InfoQuery, Option, OptionReply, ProtocolError

_GREETING: Final = Struct(">QQH")
_REPLY: Final = Struct(">QIII")
_INFO_EXPORT: Final = Struct(">HQH")
_INFO_BLOCK_SIZE: Final = Struct(">HIII")
_CLIENT_FLAGS: Final = Struct(">I")
_ERROR: Final = 1 << 31
#: The longest that an honest server says: a description of MAX_STRING_BYTES.
_MAX_REPLY_BYTES: Final = wire.MAX_STRING_BYTES + 2


class Refused(Exception):
    """The server does not serve the export to this client. reply: why, as OptionReply numbers it."""

    def __init__(self, reply: int, text: str) -> None:
        super().__init__(text)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the server says of the export. flags: NBD, "Transmission flags"."""

    size_bytes: int
    flags: int
    minimum_block_bytes: int = 1
    preferred_block_bytes: int = 4096


class Negotiation:
    """One handshake for the export `name`. option: GO, or INFO, after which the connection is of no more use."""

    def __init__(self, name: str, option: Option = Option.GO, *, tls: bool = False) -> None:
        self.agreed: Agreed | None = None
        self.must_start_tls = False
        self._wanted = option
        self._asked = Option.STARTTLS if tls else option
        """What is waited for."""
        self._query = wire.serialize_info_query(InfoQuery(name, (Info.BLOCK_SIZE,)))
        self._received = bytearray()
        self._to_send = bytearray()
        self._greeted = False
        self._export: tuple[int, int] | None = None
        self._blocks = (1, 4096)

    def receive_data(self, data: bytes) -> None:
        """Take what the server sent. Raises ProtocolError, and Refused where it answers with an error."""
        self._received += data
        if not self._greeted:
            self._greet()
        while self._greeted and not self._is_done and self._take_reply():
            pass
        if self._is_done and self._received:
            raise ProtocolError(f"{len(self._received)} bytes after the handshake's end")

    def data_to_send(self) -> bytes:
        """What is to be sent now; each byte is returned once."""
        data = bytes(self._to_send)
        self._to_send.clear()
        return data

    def tls_started(self) -> None:
        """What is said from here on is under TLS."""
        assert self.must_start_tls
        self.must_start_tls, self._asked = False, self._wanted
        self._ask()

    @property
    def _is_done(self) -> bool:
        """There is nothing more to hear: at all, or in plain."""
        return self.agreed is not None or self.must_start_tls

    def _ask(self) -> None:
        data = b"" if self._asked == Option.STARTTLS else self._query
        self._to_send += wire.serialize_option(self._asked, data)

    def _greet(self) -> None:
        if len(self._received) < _GREETING.size:
            return
        password, magic, flags = _GREETING.unpack_from(self._received)
        del self._received[: _GREETING.size]
        if password != wire.INIT_PASSWD or magic != wire.OPTION_MAGIC:
            raise ProtocolError(f"no NBD server: it says {password:#x} {magic:#x}")
        if not flags & wire.FIXED_NEWSTYLE:
            raise ProtocolError("the NBD server does not know fixed newstyle")
        self._to_send += _CLIENT_FLAGS.pack(flags & wire.HANDSHAKE_FLAGS)
        self._ask()
        self._greeted = True

    def _take_reply(self) -> bool:
        if len(self._received) < _REPLY.size:
            return False
        magic, option, reply, length = _REPLY.unpack_from(self._received)
        if magic != wire.OPTION_REPLY_MAGIC or option != self._asked or length > _MAX_REPLY_BYTES:
            raise ProtocolError(f"no reply to option {self._asked}: {magic:#x}, option {option}, {length} bytes")
        if len(self._received) < _REPLY.size + length:
            return False
        data = bytes(self._received[_REPLY.size : _REPLY.size + length])
        del self._received[: _REPLY.size + length]
        self._heed(reply, data)
        return True

    def _heed(self, reply: int, data: bytes) -> None:
        if reply & _ERROR:
            raise Refused(reply, data.decode(errors="replace") or f"error {reply:#x}")
        if self._asked == Option.STARTTLS and reply == OptionReply.ACK:
            self.must_start_tls = True
        elif self._asked != Option.STARTTLS and reply == OptionReply.INFO:
            self._learn(data)
        elif self._asked != Option.STARTTLS and reply == OptionReply.ACK:
            if self._export is None:
                raise ProtocolError("the server agrees without telling the export's size")
            self.agreed = Agreed(*self._export, *self._blocks)
        else:
            raise ProtocolError(f"reply {reply} to option {self._asked}")

    def _learn(self, data: bytes) -> None:
        kind = int.from_bytes(data[:2], "big")
        if kind == Info.EXPORT and len(data) == _INFO_EXPORT.size:
            self._export = _INFO_EXPORT.unpack(data)[1:]
        elif kind == Info.BLOCK_SIZE and len(data) == _INFO_BLOCK_SIZE.size:
            self._blocks = _INFO_BLOCK_SIZE.unpack(data)[1:3]
