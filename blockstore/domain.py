"""The nouns of Cairn: ids, positions, members, volumes. Words as in docs/architecture.md, glossary."""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, NewType

from blockstore.errors import InvalidRequest
from blockstore.units import Epoch, Sequence

VolumeId = NewType("VolumeId", str)
"""vol- and 17 hexadecimal digits, as EBS has them."""
ReplicaId = NewType("ReplicaId", str)
"""rep- and 17 hexadecimal digits; never used again, also not on the same node."""
NodeId = NewType("NodeId", str)
"""node- and 17 hexadecimal digits; kept in the node's data directory."""
FrontEndId = NewType("FrontEndId", str)
"""fe- and 17 hexadecimal digits; kept in the front-end's state directory."""
SnapshotId = NewType("SnapshotId", str)
"""snap- and 17 hexadecimal digits."""
DaemonId = NewType("DaemonId", str)
"""sd- and 17 hexadecimal digits: a snapshotd; kept in its state directory."""
SegmentNumber = NewType("SegmentNumber", int)
"""The index of a segment in its volume's list of segments."""

_ID: Final = re.compile(r"(vol|rep|node|fe|snap|sd)-[0-9a-f]{17}")
_PREFIXES: Final = {"vol", "rep", "node", "fe", "snap", "sd"}


def make_id(prefix: str, random_bytes: bytes) -> str:
    """An id such as vol-0123456789abcdef0 of 9 random bytes that the caller brings (68 bits are used)."""
    if prefix not in _PREFIXES or len(random_bytes) != 9:
        raise ValueError(f"make_id({prefix!r}, {len(random_bytes)} bytes): needs a known prefix and 9 bytes")
    return f"{prefix}-{random_bytes.hex()[:17]}"


def check_id(prefix: str, text: str) -> str:
    """`text`, if it is an id of that kind; it is safe as a file name then. Raises InvalidRequest."""
    if not _ID.fullmatch(text) or not text.startswith(prefix + "-"):
        raise InvalidRequest(f"{text!r} is no {prefix}- id: expected {prefix}- and 17 hexadecimal digits")
    return text


class Position(NamedTuple):
    """Where a record stands in its segment's log. Ordered by epoch first, then by sequence (Raft, 5.4.1)."""

    epoch: Epoch
    sequence: Sequence


ORIGIN: Final = Position(Epoch(0), Sequence(0))
"""Before the first record of any log."""


@dataclass(frozen=True, slots=True)
class Member:
    """One replica of a segment, and the node that holds it."""

    replica: ReplicaId
    node: NodeId


@dataclass(frozen=True, slots=True)
class Configuration:
    """The members of a segment; its number grows by one with each change and is fenced like the epoch.

    old_members: those of the configuration before, while a change is between its two steps, else ().
    """

    number: int
    members: tuple[Member, ...]
    old_members: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaAddress:
    """What each message to a replica names, so that a process at a reused address is never taken for it."""

    volume: VolumeId
    segment: SegmentNumber
    replica: ReplicaId


class VolumeState(Enum):
    """As EBS has them."""

    CREATING = "creating"
    AVAILABLE = "available"
    IN_USE = "in-use"
    DELETING = "deleting"
    ERROR = "error"
