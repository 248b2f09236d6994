"""How a volume is cut into segments, and how it grows. Pure: sizes in, sizes out.

    [ full ][ full ][ ... ][ last: grows up to a full one's size ]

Every segment but the last has its size for good, because a block's place follows from the sizes before it; so a
volume grows in its last segment first, and then by further ones. A segment's end is a multiple of an extent where
another one follows, so that no extent, and no window of a source, is shared by two. A volume has at most
MAX_SEGMENTS: where more would be needed, they are larger. Source: docs/architecture.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blockstore.errors import InvalidRequest
from blockstore.units import EXTENT_SIZE, MAX_VOLUME_SIZE, MIB, format_size

#: A record in the catalog names every replica; a transaction of the metastore (128 operations) names each node twice
#: that a new volume lies on, and leaves a tombstone for each replica of one that is deleted while nodes are away.
MAX_SEGMENTS: Final = 16
#: An extent: for tests. Each segment costs its front-end three streams, and a leader's heartbeats.
MIN_SEGMENT_SIZE: Final = MIB
assert MIN_SEGMENT_SIZE % EXTENT_SIZE == 0


@dataclass(frozen=True, slots=True)
class Growth:
    """last_size_bytes: of the segment that is the last one now. further_bytes: the sizes of those to be added."""

    last_size_bytes: int
    further_bytes: tuple[int, ...]


def cut(size_bytes: int, segment_size_bytes: int) -> tuple[int, ...]:
    """The sizes of a new volume's segments."""
    return _cut(size_bytes, segment_size_bytes, MAX_SEGMENTS)


def grow(sizes: Sequence[int], size_bytes: int, segment_size_bytes: int) -> Growth:
    """What makes segments of these sizes a volume of `size_bytes`, which is not less than it has.

    A last segment beyond a full one's size (of an earlier setting) stays as it is, but for the rest of its extent.
    """
    *others, last = sizes
    assert size_bytes >= sum(sizes)
    room = MAX_SEGMENTS - len(sizes)
    in_last = size_bytes - sum(others)
    full = max(_whole_extents(last), segment_size_bytes)
    if in_last <= full or not room:
        return Growth(in_last, ())
    return Growth(full, _cut(in_last - full, segment_size_bytes, room))


def check_segment_size(size_bytes: int) -> None:
    """Raises InvalidRequest unless segments may have this size."""
    if not MIN_SEGMENT_SIZE <= size_bytes <= MAX_VOLUME_SIZE or size_bytes % EXTENT_SIZE:
        raise InvalidRequest(
            f"segments of {size_bytes} bytes: the size must be a multiple of {format_size(EXTENT_SIZE)}, "
            f"from {format_size(MIN_SEGMENT_SIZE)} to {format_size(MAX_VOLUME_SIZE)}"
        )


def _cut(size_bytes: int, segment_size_bytes: int, most: int) -> tuple[int, ...]:
    full = max(segment_size_bytes, _whole_extents(-(-size_bytes // most)))
    whole, rest = divmod(size_bytes, full)
    return (full,) * whole + ((rest,) if rest else ())


def _whole_extents(size_bytes: int) -> int:
    return -(-size_bytes // EXTENT_SIZE) * EXTENT_SIZE
