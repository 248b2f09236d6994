"""Messages with a large payload, put together and taken apart by hand: the rest of them is protobuf's.

Through protobuf a payload would be copied twice more on either side; here it is a field beside the serialized
rest, found and cut out as it lies (protobuf, "Encoding"). A parser of the whole message reads the same.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from blockstore.errors import InvalidRequest

_VARINT, _FIXED64, _LENGTH = 0, 1, 2

AnyMessage = TypeVar("AnyMessage", bound=Message)
Piece = TypeVar("Piece", bytes, bytes | memoryview)


def put_in(rest: Message, number: int, payload: Sequence[Piece]) -> list[Piece]:
    """The serialized message `rest` with `payload`, in pieces, as its field `number` (below 16), which it lacks.

    In parts: whoever sends them puts them together, or need not.
    """
    head = b"".join((rest.SerializeToString(), tag_of(number), varint(sum(map(len, payload)))))
    parts: list[Piece] = [head]
    parts.extend(payload)
    return parts


def cut_out(kind: type[AnyMessage], message: bytes | bytearray, number: int) -> tuple[AnyMessage, memoryview]:
    """A serialized message of that kind without its field `number`; that field's value, where it lies in `message`.

    Raises InvalidRequest where the bytes are no such message.
    """
    rest: list[memoryview] = []
    payload = memoryview(b"")
    view = memoryview(message)
    for field, start, value, end in fields_of(message):
        if field == number:
            payload = view[value:end]
        else:
            rest.append(view[start:end])
    return parse(kind, b"".join(rest)), payload


def parse(kind: type[AnyMessage], message: bytes | bytearray) -> AnyMessage:
    """A serialized message of that kind. Raises InvalidRequest where the bytes are none."""
    try:
        return kind.FromString(bytes(message))
    except DecodeError as error:
        raise InvalidRequest(f"not a {kind.DESCRIPTOR.name}: {error}") from error


def tag_of(number: int) -> bytes:
    """What stands before the length of the field `number` (below 16) and its bytes."""
    return bytes([number << 3 | _LENGTH])


def fields_of(message: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Of each field of a message: its number, where it starts, where its value does, where it ends.

    The number is 0 where its value is not bytes: under a number that we know, that is none of our fields, but unknown.
    Raises InvalidRequest where the bytes are no message of fields that ours have.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _read_varint(message, at)
        value = at
        if tag & 7 == _LENGTH:
            size, value = _read_varint(message, at)
            at = value + size
        elif tag & 7 == _VARINT:
            _, at = _read_varint(message, at)
        elif tag & 7 == _FIXED64:
            at += 8
        else:
            raise InvalidRequest(f"a field of type {tag & 7} is none of this protocol's")
        if at > len(message):
            raise InvalidRequest("a message ends inside a field")
        yield tag >> 3 if tag & 7 == _LENGTH else 0, start, value, at


def _read_varint(message: bytes | bytearray, at: int) -> tuple[int, int]:
    number = shift = 0
    for index in range(at, min(at + 10, len(message))):
        byte = message[index]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, index + 1
        shift += 7
    raise InvalidRequest("a message ends inside a number")


def varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
