"""The NBD protocol's numbers and messages; parsing and serializing stand side by side.

Follows doc/proto.md of the NetworkBlockDevice project ("the NBD text" in this package); headings of
it are cited as "NBD, heading". All numbers are big-endian. Nothing here keeps state or allocates
by a length that a client claims: the lengths are checked by those who call.
"""

import errno
from enum import IntEnum
from struct import Struct, unpack
from typing import Final, NamedTuple

# NBD, "Newstyle negotiation" and "Fixed newstyle negotiation".
INIT_PASSWD: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
# NBD, "Request message".
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
# NBD, "Simple reply message", "Structured reply chunk message" and "Extended reply chunk message".
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# NBD, "Handshake flags" and "Client flags": the same two bits on both sides.
FIXED_NEWSTYLE: Final = 1 << 0
NO_ZEROES: Final = 1 << 1
HANDSHAKE_FLAGS: Final = FIXED_NEWSTYLE | NO_ZEROES

#: NBD, "Conventions": a string is at most this long.
MAX_STRING_BYTES: Final = 4096
#: NBD, "Newstyle negotiation": follows the reply to EXPORT_NAME unless both sides said NO_ZEROES.
EXPORT_NAME_PADDING: Final = bytes(124)

_GREETING: Final = Struct(">QQH")
_OPTION_HEADER: Final = Struct(">QII")
_OPTION_REPLY: Final = Struct(">QIII")
_EXPORT: Final = Struct(">QH")
_INFO_EXPORT: Final = Struct(">HQH")
_INFO_BLOCK_SIZE: Final = Struct(">HIII")
_INFO_TYPE: Final = Struct(">H")
_LENGTH: Final = Struct(">I")
_COUNT: Final = Struct(">H")
REQUEST: Final = Struct(">IHHQQI")
"""magic, command flags, type, cookie, offset, length."""
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
"""The same, with a length of 64 bits."""
SIMPLE_REPLY: Final = Struct(">IIQ")
"""magic, error, cookie."""

#: NBD, "Request types", NBD_CMD_BLOCK_STATUS: a payload is an effect length, and numbers of contexts.
STATUS_FILTER_BYTES: Final = 8
CONTEXT_ID_BYTES: Final = 4

CLIENT_FLAGS_BYTES: Final = 4
OPTION_HEADER_BYTES: Final = _OPTION_HEADER.size


class ProtocolError(Exception):
    """The client broke the protocol so that nothing it sends from here on can be understood."""


class Malformed(Exception):
    """An option's data does not parse; the option after it still can."""


class TransmissionFlag(IntEnum):
    """NBD, "Transmission flags"."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(IntEnum):
    """NBD, "Option types": those that this server knows."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(IntEnum):
    """NBD, "Option reply types"."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


class Info(IntEnum):
    """NBD, "Option reply types", NBD_REP_INFO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(IntEnum):
    """NBD, "Request types": those that this server knows."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntEnum):
    """NBD, "Command flags": those that this server knows."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(IntEnum):
    """NBD, "Structured and extended header reply flags"."""

    DONE = 1 << 0


class ReplyType(IntEnum):
    """NBD, "Structured reply types"."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class WireError(IntEnum):
    """NBD, "Error values": the only ones that a reply may carry."""

    NONE = 0
    EPERM = errno.EPERM
    EIO = errno.EIO
    ENOMEM = errno.ENOMEM
    EINVAL = errno.EINVAL
    ENOSPC = errno.ENOSPC
    EOVERFLOW = errno.EOVERFLOW
    ENOTSUP = errno.ENOTSUP
    ESHUTDOWN = errno.ESHUTDOWN


class OptionHeader(NamedTuple):
    """What precedes an option's data. option: maybe none that is known; length: of the data, in bytes."""

    option: int
    length: int


class InfoQuery(NamedTuple):
    """The data of INFO and GO. items: the information asked for, known or not."""

    name: str
    items: tuple[int, ...]


def serialize_greeting() -> bytes:
    """What the server says first."""
    return _GREETING.pack(INIT_PASSWD, OPTION_MAGIC, HANDSHAKE_FLAGS)


def parse_client_flags(data: bytes) -> int:
    """The client's flags; raises ProtocolError where one is set that the server does not know."""
    flags = _LENGTH.unpack(data)[0]
    if flags & ~HANDSHAKE_FLAGS:
        raise ProtocolError(f"client flags {flags:#x}: only {HANDSHAKE_FLAGS:#x} are known")
    return int(flags)


def serialize_option(option: int, data: bytes = b"") -> bytes:
    """An option as a client sends it."""
    return _OPTION_HEADER.pack(OPTION_MAGIC, option, len(data)) + data


def parse_option_header(data: bytes) -> OptionHeader:
    """OPTION_HEADER_BYTES of `data`; raises ProtocolError where the magic is not there."""
    magic, option, length = _OPTION_HEADER.unpack(data)
    if magic != OPTION_MAGIC:
        raise ProtocolError(f"option magic {magic:#x} instead of {OPTION_MAGIC:#x}")
    return OptionHeader(option, length)


def serialize_option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """A reply to `option`; several may belong to one option."""
    return _OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def serialize_export(size_bytes: int, flags: int) -> bytes:
    """The reply to EXPORT_NAME, without the padding."""
    return _EXPORT.pack(size_bytes, flags)


def serialize_server(name: str, description: str) -> bytes:
    """The data of a reply SERVER to LIST."""
    encoded = name.encode()
    return _LENGTH.pack(len(encoded)) + encoded + description.encode()


def serialize_info_export(size_bytes: int, flags: int) -> bytes:
    """The data of a reply INFO, of type EXPORT."""
    return _INFO_EXPORT.pack(Info.EXPORT, size_bytes, flags)


def serialize_info_text(kind: Info, text: str) -> bytes:
    """The data of a reply INFO, of type NAME or DESCRIPTION."""
    return _INFO_TYPE.pack(kind) + text.encode()


def serialize_info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    """The data of a reply INFO, of type BLOCK_SIZE; in bytes."""
    return _INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, minimum, preferred, maximum)


def parse_name(data: bytes) -> str:
    """An export's name; raises Malformed where it is too long, no UTF-8, or has a NUL."""
    if len(data) > MAX_STRING_BYTES:
        raise Malformed(f"a name of {len(data)} bytes: at most {MAX_STRING_BYTES} are allowed")
    try:
        name = data.decode()
    except UnicodeDecodeError as error:
        raise Malformed("the name is not UTF-8") from error
    if "\0" in name:
        raise Malformed("the name has a NUL")
    return name


def serialize_info_query(query: InfoQuery) -> bytes:
    """The data of INFO and GO as a client sends them."""
    name = query.name.encode()
    items = b"".join(_COUNT.pack(item) for item in query.items)
    return _LENGTH.pack(len(name)) + name + _COUNT.pack(len(query.items)) + items


def parse_info_query(data: bytes) -> InfoQuery:
    """The data of INFO and GO; raises Malformed where the lengths in it do not add up."""
    if len(data) < _LENGTH.size + _COUNT.size:
        raise Malformed(f"{len(data)} bytes are too few for a name's length and a count")
    (name_length,) = _LENGTH.unpack_from(data)
    items_at = _LENGTH.size + name_length + _COUNT.size
    if items_at > len(data):
        raise Malformed(f"a name of {name_length} bytes does not fit into {len(data)}")
    name = parse_name(data[_LENGTH.size : _LENGTH.size + name_length])
    (count,) = _COUNT.unpack_from(data, items_at - _COUNT.size)
    if items_at + 2 * count != len(data):
        raise Malformed(f"{count} information requests do not fill {len(data)} bytes")
    return InfoQuery(name, tuple(_COUNT.unpack_from(data, items_at + 2 * i)[0] for i in range(count)))


class ContextQuery(NamedTuple):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def serialize_context_query(query: ContextQuery) -> bytes:
    """As a client sends it."""
    strings = [text.encode() for text in (query.name, *query.queries)]
    name, *queries = [_LENGTH.pack(len(text)) + text for text in strings]
    return name + _LENGTH.pack(len(queries)) + b"".join(queries)


def parse_context_query(data: bytes) -> ContextQuery:
    """Raises Malformed where the lengths in it do not add up, or a string is none."""
    name, at = _parse_string(data, 0)
    count, at = _parse_length(data, at)
    queries = []
    for _ in range(min(count, len(data))):
        query, at = _parse_string(data, at)
        queries.append(query)
    if len(queries) != count or at != len(data):
        raise Malformed(f"{count} queries do not fill {len(data)} bytes")
    return ContextQuery(name, tuple(queries))


def _parse_string(data: bytes, at: int) -> tuple[str, int]:
    """A string behind its length, and where it ends."""
    length, at = _parse_length(data, at)
    if at + length > len(data):
        raise Malformed(f"a string of {length} bytes does not fit into {len(data)}")
    return parse_name(data[at : at + length]), at + length


def _parse_length(data: bytes, at: int) -> tuple[int, int]:
    if at + _LENGTH.size > len(data):
        raise Malformed(f"{len(data)} bytes are too few for a length")
    return int(_LENGTH.unpack_from(data, at)[0]), at + _LENGTH.size


def serialize_meta_context(number: int, name: str) -> bytes:
    """The data of a reply META_CONTEXT."""
    return _LENGTH.pack(number) + name.encode()


def parse_status_filter(payload: bytes | bytearray) -> tuple[int, tuple[int, ...]]:
    """The payload of a BLOCK_STATUS: how many bytes it asks for, and the numbers of the contexts.

    payload: of a length that was found good (transmission.refusal).
    """
    count = (len(payload) - STATUS_FILTER_BYTES) // CONTEXT_ID_BYTES
    length, *numbers = unpack(f">Q{count}I", payload)
    return length, tuple(numbers)


def serialize_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """The header of a request as a client sends it; a write's payload follows."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


def serialize_extended_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """The same with an extended header; a payload follows where PAYLOAD_LEN is among the flags."""
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)


def serialize_simple_reply(cookie: int, error: int = WireError.NONE) -> bytes:
    """The header of a simple reply; the data of a read that succeeded follows."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
