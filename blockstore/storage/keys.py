"""The keys and values of a replica's tables, and nothing about where they are kept.

Keys are big-endian, so that order on disk is order by block; the generation is inverted, so that one
seek finds the newest version at or below any generation (docs/storage.md, tables). LMDB does not
check its own pages: an index entry carries the checksum of its block, which is seeded with where
the block belongs, and every other value ends with a checksum over its key and itself. A row that
fails is Corrupt, never read as something else.
"""

import struct
from collections.abc import Iterable, Iterator
from itertools import repeat
from operator import itemgetter
from typing import Final, NamedTuple

import xxhash

from blockstore.errors import Corrupt
from blockstore.record import block_checksum
from blockstore.units import BLOCK_SIZE, EXTENT_BLOCKS, MAX_GENERATION, Generation, Sequence

VERSION_KEY: Final = struct.Struct(">QI")
NUMBER_SIZE: Final = 8
EXTENT_KEY: Final = struct.Struct(">IQ")
NUMBER_KEY: Final = struct.Struct(">Q")

#: A block's first bytes go to `data`, its last to `index`: 4,080 bytes and LMDB's page header fill one page,
#: where a whole block would take two (8,226 bytes a block measured, 4,205 split).
HEAD_SIZE: Final = 4080
TAIL_SIZE: Final = BLOCK_SIZE - HEAD_SIZE
INDEX_VALUE: Final = struct.Struct("<QQB")
DATA_VALUE: Final = struct.Struct(f"<QQB{TAIL_SIZE}s")
_TAILS: Final = struct.Struct(f"{HEAD_SIZE}x{TAIL_SIZE}s")
ZERO_FLAG: Final = 0
DATA_FLAG: Final = 1

BITMAP_SIZE: Final = EXTENT_BLOCKS // 8
ALL_BITS: Final = (1 << EXTENT_BLOCKS) - 1
_EXTENT_VALUE: Final = struct.Struct(f"<Q{BITMAP_SIZE}s")
_CHECK: Final = struct.Struct("<Q")


Key = tuple[int, Generation]
"""A block number and a generation: what an entry of `index` is for."""


class Version(NamedTuple):
    """One entry of `index`: which write a block's content in a generation comes from.

    checksum: as blockstore.record has it; of a zero entry that of no bytes. tail: the block's last
    TAIL_SIZE bytes, None for a zero entry.
    """

    sequence: Sequence
    checksum: int
    tail: bytes | None


def version_key(number: int, generation: int) -> bytes:
    """The key of a block's version in `index` and `data`."""
    return VERSION_KEY.pack(number, MAX_GENERATION - generation)


def version_keys(start: int, end: int, generation: int) -> list[bytes]:
    """Those of the blocks [start, end), in order."""
    return list(map(VERSION_KEY.pack, range(start, end), repeat(MAX_GENERATION - generation)))


def parse_version_key(key: bytes | memoryview) -> tuple[int, Generation]:
    """Block number and generation. Raises Corrupt."""
    if len(key) != VERSION_KEY.size:
        raise Corrupt(f"a key of {len(key)} bytes in index or data, expected {VERSION_KEY.size}")
    number, inverted = VERSION_KEY.unpack(key)
    return number, Generation(MAX_GENERATION - inverted)


def zero_value(number: int, generation: int, sequence: int) -> bytes:
    """The index entry of a block that reads as zeroes."""
    return INDEX_VALUE.pack(sequence, block_checksum(b"", number, generation, sequence), ZERO_FLAG)


def data_value(sequence: int, checksum: int, block: bytes | memoryview) -> bytes:
    """The index entry of a block whose first HEAD_SIZE bytes are in `data`."""
    return DATA_VALUE.pack(sequence, checksum, DATA_FLAG, bytes(block[HEAD_SIZE:]))


def data_values(sequence: int, checksums: Iterable[int], blocks: memoryview) -> Iterator[bytes]:
    """data_value of each of the blocks that lie in `blocks`."""
    tails = map(itemgetter(0), _TAILS.iter_unpack(blocks))
    return map(DATA_VALUE.pack, repeat(sequence), checksums, repeat(DATA_FLAG), tails)


def heads(blocks: memoryview) -> list[memoryview]:
    """Of each of the blocks that lie in `blocks`, what goes to `data`."""
    return [blocks[at : at + HEAD_SIZE] for at in range(0, len(blocks), BLOCK_SIZE)]


def parse_index_value(number: int, generation: int, value: bytes | memoryview) -> Version | None:
    """The entry of that key; None where it is damaged in a way that shows without the block itself."""
    if len(value) == DATA_VALUE.size and value[16] == DATA_FLAG:
        sequence, checksum, _, tail = DATA_VALUE.unpack(value)
        return Version(Sequence(sequence), checksum, tail)
    if len(value) == INDEX_VALUE.size and value[16] == ZERO_FLAG:
        sequence, checksum, _ = INDEX_VALUE.unpack(value)
        if checksum == block_checksum(b"", number, generation, sequence):
            return Version(Sequence(sequence), checksum, None)
    return None


def raw_sequence(value: bytes | memoryview) -> Sequence:
    """What an index entry says of its sequence, which is not vouched for where the entry is damaged."""
    return Sequence(int.from_bytes(value[:8], "little"))


def raw_checksum(value: bytes | memoryview) -> int:
    """What an index entry says of its block's checksum, as little vouched for."""
    return int.from_bytes(value[8:16], "little")


def extent_key(generation: int, extent: int) -> bytes:
    """The key of a row of `extents`."""
    return EXTENT_KEY.pack(generation, extent)


def number_key(number: int) -> bytes:
    """The key of a row of `present` (an extent) or `tail` (a sequence)."""
    return NUMBER_KEY.pack(number)


class ExtentRow(NamedTuple):
    """What `extents` says of one extent in one generation; bit i of `bits` stands for its block i."""

    sequence: Sequence
    bits: int

    def encode(self, key: bytes) -> bytes:
        return with_check(key, _EXTENT_VALUE.pack(self.sequence, self.bits.to_bytes(BITMAP_SIZE, "little")))

    @classmethod
    def decode(cls, key: bytes | memoryview, value: bytes | memoryview) -> "ExtentRow":
        """Raises Corrupt."""
        content = without_check(key, value)
        if len(content) != _EXTENT_VALUE.size:
            raise Corrupt(f"a row of extents has {len(content)} bytes, expected {_EXTENT_VALUE.size}")
        sequence, bits = _EXTENT_VALUE.unpack(content)
        return cls(Sequence(sequence), int.from_bytes(bits, "little"))


def encode_bits(key: bytes, bits: int) -> bytes:
    """The value of a row of `present`."""
    return with_check(key, bits.to_bytes(BITMAP_SIZE, "little"))


def decode_bits(key: bytes | memoryview, value: bytes | memoryview) -> int:
    """The reverse of encode_bits. Raises Corrupt."""
    content = without_check(key, value)
    if len(content) != BITMAP_SIZE:
        raise Corrupt(f"a row of present has {len(content)} bytes, expected {BITMAP_SIZE}")
    return int.from_bytes(content, "little")


def with_check(key: bytes, content: bytes) -> bytes:
    """`content` with a checksum over key and content behind it."""
    return content + _CHECK.pack(xxhash.xxh3_64_intdigest(key + content))


def without_check(key: bytes | memoryview, value: bytes | memoryview) -> bytes:
    """The content of a value made by with_check. Raises Corrupt where it is not as written."""
    content = bytes(value[: -_CHECK.size])
    if len(value) < _CHECK.size or _CHECK.pack(xxhash.xxh3_64_intdigest(bytes(key) + content)) != value[len(content) :]:
        raise Corrupt(f"the row {bytes(key).hex()} fails its checksum")
    return content


def bits_between(start: int, end: int, extent: int) -> int:
    """The bits, in the bitmap of `extent`, of the blocks [start, end)."""
    first = max(start - extent * EXTENT_BLOCKS, 0)
    last = min(end - extent * EXTENT_BLOCKS, EXTENT_BLOCKS)
    return ((1 << last) - 1) & ~((1 << first) - 1) if first < last else 0


def blocks_of(extent: int, bits: int) -> list[int]:
    """The block numbers that `bits` names, ascending."""
    first = extent * EXTENT_BLOCKS
    numbers = []
    while bits:
        lowest = bits & -bits
        numbers.append(first + lowest.bit_length() - 1)
        bits ^= lowest
    return numbers
