"""How numbers, texts and columns lie in the plaintext of stored objects, both ways.

All numbers are little-endian. A *column* is n numbers of w bytes by planes: the lowest byte of each of the
n numbers, then the second byte of each, and so on; neighbours in a plane resemble each other, which is
what zstd lives from. `Fields` reads, and refuses with Corrupt whatever is missing, too large or left over: every
count is bounded before anything is made of it. Source: docs/format.md, "Fields".
"""

import sys
from array import array
from collections.abc import Sequence
from typing import Final, Literal

from blockstore.errors import Corrupt

MAX_TEXT: Final = 65_535
"""Bytes of a text: what its length field holds."""

Width = Literal[1, 2, 4]
_TYPECODES: Final[dict[Width, str]] = {1: "B", 2: "H", 4: "I"}
assert all(array(code).itemsize == width for width, code in _TYPECODES.items())


class Fields:
    """Reads one plaintext from front to back; `what` names the object in errors."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._what = what

    def take(self, size: int) -> bytes:
        """The next `size` bytes. Raises Corrupt where there are fewer."""
        end = self._at + size
        if end > len(self._data):
            raise self.error(f"ends at byte {len(self._data)}, where a field goes up to {end}")
        taken = bytes(self._data[self._at : end])
        self._at = end
        return taken

    def number(self, width: int, most: int | None = None) -> int:
        """An unsigned number of `width` bytes, at most `most`."""
        value = int.from_bytes(self.take(width), "little")
        if most is not None and value > most:
            raise self.error(f"has a count of {value}, above the limit of {most}")
        return value

    def signed(self) -> int:
        """A number of 8 bytes with a sign."""
        return int.from_bytes(self.take(8), "little", signed=True)

    def text(self) -> str:
        """A text: its length in bytes (2), then UTF-8."""
        raw = self.take(self.number(2))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has a text that is not UTF-8: {raw[:40]!r}") from error

    def names(self, count: int, size: int) -> list[bytes]:
        """`count` byte strings of `size` bytes each."""
        raw = self.take(count * size)
        return [raw[at : at + size] for at in range(0, count * size, size)]

    def column(self, count: int, width: Width) -> "array[int]":
        """`count` numbers of `width` bytes, by planes."""
        planes = self.take(count * width)
        rows = bytearray(count * width)
        for plane in range(width):
            rows[plane::width] = planes[plane * count : (plane + 1) * count]
        return _native(array(_TYPECODES[width], bytes(rows)))

    def end(self) -> None:
        """Raises Corrupt unless everything was read."""
        if self._at != len(self._data):
            raise self.error(f"has {len(self._data) - self._at} bytes too many")

    def error(self, message: str) -> Corrupt:
        return Corrupt(f"{self._what} {message}: it was not written by Cairn as it is")


def text(value: str) -> bytes:
    """A text as `Fields.text` reads it. Raises ValueError where it is too long."""
    raw = value.encode()
    if len(raw) > MAX_TEXT:
        raise ValueError(f"a text of {len(raw)} bytes does not fit: at most {MAX_TEXT}")
    return len(raw).to_bytes(2, "little") + raw


def column(numbers: Sequence[int], width: Width) -> bytes:
    """The column of `numbers`, as `Fields.column` reads it. Raises OverflowError where one does not fit."""
    rows = _native(array(_TYPECODES[width], numbers)).tobytes()
    return b"".join(rows[plane::width] for plane in range(width))


def _native(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
