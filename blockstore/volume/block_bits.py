"""Blocks as bits: bit i of an int, or of bytes (byte i // 8, the lowest first), is a range's block i."""

from collections.abc import Iterator


def bits_of(bitmap: bytes | bytearray, first: int, count: int) -> int:
    """The bits [first, first + count) of a bitmap, as an int; bits beyond its end are 0."""
    part = int.from_bytes(bitmap[first // 8 : (first + count + 7) // 8], "little")
    return part >> first % 8 & mask(count)


def mask(count: int) -> int:
    """`count` bits, all set."""
    return (1 << count) - 1


def runs_of(bits: int) -> Iterator[tuple[int, int]]:
    """The runs (first, count) of set bits, in order."""
    at = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        at += skipped
        count = (~bits & (bits + 1)).bit_length() - 1
        yield at, count
        bits >>= count
        at += count


def set_bits(bitmap: bytearray, first: int, count: int) -> None:
    """Set the bits [first, first + count), which lie inside it."""
    low, high = first // 8, (first + count + 7) // 8
    part = int.from_bytes(bitmap[low:high], "little") | mask(count) << first % 8
    bitmap[low:high] = part.to_bytes(high - low, "little")
