"""The nouns of Cairn: ids, positions, members, volumes. Words as in docs/architecture.md, glossary."""

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple, NewType

from blockstore.errors import Conflict, InvalidRequest
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
class TablesPlace:
    """Where a replica has its tables, for who runs on the same machine. host: names that (blockstore/storage/fence.py).

    fence: device and inode of the file `fence` in the directory.
    """

    host: str
    directory: str
    fence: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Replacement:
    """A change of members before its first step: the newcomer is filled, and has no vote. reason: for people."""

    newcomer: Member
    replaces: ReplicaId
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The members of a segment; its number grows by one with each step and is fenced like the epoch.

    old_members: those of the configuration before, while a change is between its two steps, else ().
    replacement: of which the number says nothing, because it changes no quorum; None while old_members stand.
    A change goes enlist -> joint -> settle, or ends in dismiss before its first step (docs/replication.md, rule 7).
    """

    number: int
    members: tuple[Member, ...]
    old_members: tuple[Member, ...] = ()
    replacement: Replacement | None = None

    @property
    def everyone(self) -> tuple[Member, ...]:
        """All that are sent the log, each once: members, old members, and a newcomer."""
        if not self.old_members and self.replacement is None:
            return self.members
        newcomer = (self.replacement.newcomer,) if self.replacement else ()
        return tuple(dict.fromkeys((*self.members, *self.old_members, *newcomer)))

    @property
    def is_changing(self) -> bool:
        """Whether a change of members is under way."""
        return bool(self.replacement or self.old_members)

    @property
    def leaving(self) -> tuple[Member, ...]:
        """Who is a member no more once the change under way has settled."""
        return tuple(member for member in self.old_members if member not in self.members)

    def enlist(self, replacement: Replacement) -> "Configuration":
        """Its newcomer is to be filled. Raises Conflict while another change is under way."""
        if self.old_members or self.replacement:
            raise Conflict(f"configuration {self.number} changes already: wait until that has ended")
        if all(member.replica != replacement.replaces for member in self.members):
            raise Conflict(f"{replacement.replaces} is no member: it cannot be replaced")
        others = [member for member in self.members if member.replica != replacement.replaces]
        if any(replacement.newcomer.node == member.node for member in others):
            raise Conflict(f"node {replacement.newcomer.node} holds a replica of this segment already")
        return replace(self, replacement=replacement)

    def dismiss(self) -> "Configuration":
        """The newcomer goes; nothing ever rested on it."""
        return replace(self, replacement=None)

    def joint(self) -> "Configuration":
        """The first step: from here on a quorum is one of the new members and one of the old ones."""
        change = self.replacement
        if change is None:
            raise Conflict(f"configuration {self.number} has no newcomer that could become a member")
        members = tuple(change.newcomer if each.replica == change.replaces else each for each in self.members)
        return Configuration(self.number + 1, members, self.members)

    def settle(self) -> "Configuration":
        """The second step: the old members count no more. Only once a record is on quorums of both."""
        if not self.old_members:
            raise Conflict(f"configuration {self.number} has no old members")
        return Configuration(self.number + 1, self.members)


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

    __hash__ = object.__hash__  # of each there is one object; Enum's is Python, and control asks for it all the time
