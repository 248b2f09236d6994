"""Sizes and the numbers that must not be mixed.

A block is the unit of storage, checksum, copy-on-write and dedupe; an extent is the unit in which
changes are tracked and replicas are copied. Both sizes are part of the stored format.
"""

import re
from typing import Final, NewType

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

BLOCK_SIZE: Final = 4 * KIB
EXTENT_BLOCKS: Final = 256
EXTENT_SIZE: Final = EXTENT_BLOCKS * BLOCK_SIZE

#: No volume is larger: block numbers are bounded before anything a peer claims is believed.
MAX_VOLUME_SIZE: Final = 64 * TIB
MAX_BLOCKS: Final = MAX_VOLUME_SIZE // BLOCK_SIZE

#: One record, payload included, never exceeds this: gRPC refuses messages over 4 MiB unless told otherwise.
MAX_RECORD_PAYLOAD: Final = MIB

BlockNumber = NewType("BlockNumber", int)
"""Byte offset in its segment divided by BLOCK_SIZE."""
Epoch = NewType("Epoch", int)
"""Grows each time a volume is attached; 0 before the first attachment."""
Sequence = NewType("Sequence", int)
"""The number of a record in its segment: 1, 2, 3 ... without gaps; 0 before the first."""
Generation = NewType("Generation", int)
"""The number of a layer: 0 holds fills, the guest's first writes belong to 1, a seal begins the next."""

FILL_GENERATION: Final = Generation(0)
FIRST_GENERATION: Final = Generation(1)
MAX_GENERATION: Final = Generation((1 << 32) - 1)
"""Above every generation: what is asked as of it is asked of the one that writes belong to now."""

_SUFFIXES: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
#: What a size in a message can hold (64 bits with a sign).
_MAX_SIZE: Final = 2**63 - 1
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that `text` names: a number with K, M, G or T (powers of 1024), "iB" allowed.

    Raises ValueError where it is no such number, not a whole number of bytes, or above _MAX_SIZE.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size: write it like 512M, 10G or 1T")
    size = float(match[1]) * _SUFFIXES[match[2].lower()]
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is too large: sizes are below {format_size(_MAX_SIZE)}")
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size_bytes: int) -> str:
    """`size_bytes` for people, in powers of 1024 with one decimal at most: 512 B, 1.5 GiB."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.1f}".removesuffix(".0") + f" {unit}"
        size /= 1024
    return f"{size:.1f}".removesuffix(".0") + " TiB"
