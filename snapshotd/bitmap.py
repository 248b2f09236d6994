"""Bitmaps of blocks: bit i is byte i // 8, mask 1 << i % 8.

That is the order of the change lists of nodes and of all answers of snapshotd. A bitmap whose count is
no multiple of 8 ends with bits that are 0.
"""

from collections.abc import Iterable, Iterator

_ONES = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


def from_numbers(numbers: Iterable[int], count: int) -> bytes:
    """The bitmap of `count` bits in which exactly those of `numbers`, each in 0..count-1, are set."""
    bits = bytearray(size(count))
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"bit {number} is outside a bitmap of {count} bits")
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def size(count: int) -> int:
    """The bytes that `count` bits take."""
    return (count + 7) // 8


def is_set(bits: bytes | memoryview, number: int) -> bool:
    """Whether bit `number` is set; beyond the end none is."""
    byte = number >> 3
    return byte < len(bits) and bits[byte] >> (number & 7) & 1 == 1


def numbers(bits: bytes | memoryview) -> Iterator[int]:
    """The numbers of the set bits, in order."""
    for index, byte in enumerate(bits):
        if byte:
            start = index << 3
            for bit in _ONES[byte]:
                yield start + bit


def population(bits: bytes | memoryview) -> int:
    """How many bits are set."""
    return int.from_bytes(bits, "little").bit_count()


def runs(bits: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """(start, length) of each run of set bits, in order; the runs do not touch."""
    value = int.from_bytes(bits, "little")
    start = 0
    while value:
        zeroes = (value & -value).bit_length() - 1
        value >>= zeroes
        start += zeroes
        ones = (~value & (value + 1)).bit_length() - 1
        yield start, ones
        value >>= ones
        start += ones


def part(bits: bytes | memoryview, start: int, count: int) -> bytes:
    """The `count` bits from bit `start` on, as a bitmap of their own; beyond the end they are 0."""
    window = int.from_bytes(bits[start >> 3 : size(start + count)], "little") >> (start & 7)
    return (window & (1 << count) - 1).to_bytes(size(count), "little")
