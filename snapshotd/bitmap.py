"""Bitmaps of blocks: bit i is byte i // 8, mask 1 << i % 8.

That is the order of the change lists of nodes and of all answers of snapshotd. A bitmap whose count is
no multiple of 8 ends with bits that are 0.
"""

from collections.abc import Iterable, Iterator

_ONES = tuple(tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256))


def from_numbers(numbers: Iterable[int], count: int) -> bytes:
    """The bitmap of `count` bits in which exactly those of `numbers`, each in 0..count-1, are set."""
    bits = bytearray((count + 7) // 8)
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"bit {number} is outside a bitmap of {count} bits")
        bits[number >> 3] |= 1 << (number & 7)
    return bytes(bits)


def from_runs(runs: Iterable[tuple[int, int]], count: int) -> bytes:
    """The bitmap of `count` bits in which those of each (start, length), all in 0..count-1, are set."""
    bits = 0
    for start, length in runs:
        if not 0 <= start <= start + length <= count:
            raise ValueError(f"bits {start} to {start + length} are outside a bitmap of {count} bits")
        bits |= (1 << length) - 1 << start
    return bits.to_bytes((count + 7) // 8, "little")


def numbers(bits: bytes | memoryview) -> Iterator[int]:
    """The numbers of the set bits, in order."""
    for index, byte in enumerate(bits):
        if byte:
            start = index << 3
            for bit in _ONES[byte]:
                yield start + bit


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
