"""What the catalog keeps: volumes with their segments and attachment, nodes, front-ends, tombstones, positions.

All that must change together stands in one record: a volume's epoch, its attachment and its
configurations are compared and swapped as one (design, section 3, rules 1 and 7). The field names
are the stored format (blockstore/control/codec.py). Times are milliseconds since 1970, UTC.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from blockstore.domain import (
    Configuration,
    FrontEndId,
    NodeId,
    ReplicaId,
    SegmentNumber,
    SnapshotId,
    VolumeId,
    VolumeState,
)
from blockstore.errors import InvalidRequest
from blockstore.units import BLOCK_SIZE, MAX_VOLUME_SIZE, Epoch

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ID_LIKE: Final = re.compile(r"(vol|rep|node|fe|snap|sd)-[0-9a-f]{17}")
#: As EC2 has them.
MAX_TAGS: Final = 50
MAX_TAG_KEY: Final = 128
MAX_TAG_VALUE: Final = 256
MAX_TOKEN: Final = 64
MAX_ZONE: Final = 128
MAX_INSTANCE: Final = 128
#: NBD addresses of one front-end.
MAX_URIS: Final = 16
MAX_URI: Final = 512


class AttachmentState(Enum):
    """As EBS has them."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"

    __hash__ = object.__hash__  # as VolumeState


@dataclass(frozen=True, slots=True)
class Attachment:
    """The front-end that a volume belongs to, and the epoch that it was given.

    instance: the front-end's process that the epoch was given to; no other one may use it.
    accept_loss: of a user's request to attach; it holds for that one attempt.
    client: the host that it is attached for; empty where any NBD client may connect.
    """

    front_end: FrontEndId
    instance: str
    epoch: Epoch
    state: AttachmentState
    read_only: bool
    since_ms: int
    accept_loss: bool = False
    client: str = ""


class MaintenanceState(Enum):
    """Of an attachment that control made for itself."""

    OPENING = "opening"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Maintenance:
    """A front-end that has a volume open for control's own work, while no user has attached it.

    The volume stays `available` and is not exported. It stands beside the attachment, not in its
    place: whatever a user asks for takes the volume away from it, by epoch.
    """

    front_end: FrontEndId
    instance: str
    epoch: Epoch
    state: MaintenanceState


@dataclass(frozen=True, slots=True)
class Source:
    """What a volume was made from, until it has every block itself. root: of the snapshot, hexadecimal.

    size_bytes: the snapshot's. rate_bytes: a second, for the copying in the background, 0 without a limit.
    """

    snapshot: SnapshotId
    root: str
    size_bytes: int
    rate_bytes: int = 0
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous part of a volume, and who holds it."""

    number: SegmentNumber
    size_bytes: int
    configuration: Configuration


@dataclass(frozen=True, slots=True)
class Growing:
    """A resize whose replicas are being created; the volume is as before until all of them exist.

    size_bytes: the volume's then. last_size_bytes: of the segment that is the last one now. segments: those after it.
    """

    size_bytes: int
    last_size_bytes: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume as the catalog knows it. epoch: the highest ever given; it never falls.

    source: until it is hydrated. origin: the snapshot that it was made from, for good; empty for none.
    segments: in the order of their numbers and of the volume's blocks. segment_size_bytes: what the last one grows to
    before another is added; 0 for a volume of an older program: as control is set then. origin_size_bytes: of that
    snapshot; 0 for a volume of an older program: it has something of it in its first segment alone.
    loss_epochs: those that were to go on with a loss accepted, ascending; never forgotten.
    warnings: of an older program, and of no meaning: where its replicas are now is what counts.
    """

    id: VolumeId
    name: str
    size_bytes: int
    state: VolumeState
    created_at_ms: int
    segments: tuple[Segment, ...]
    epoch: Epoch = Epoch(0)
    attachment: Attachment | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    warnings: tuple[str, ...] = ()
    client_token: str = ""
    maintenance: Maintenance | None = None
    source: Source | None = None
    origin: str = ""
    segment_size_bytes: int = 0
    origin_size_bytes: int = 0
    growing: Growing | None = None
    loss_epochs: tuple[Epoch, ...] = ()

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """With those that are being created: whatever has a replica somewhere."""
        return self.segments + (self.growing.segments if self.growing else ())


@dataclass(frozen=True, slots=True)
class Node:
    """A node that registered; what it reports with each heartbeat is not stored."""

    id: NodeId
    address: str
    zone: str
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class Draining:
    """A node whose replicas are moved away. A record of its own: the node writes its own record when it registers."""

    node: NodeId
    since_ms: int


@dataclass(frozen=True, slots=True)
class RepairChoices:
    """What somebody has set on the running cluster, None for what is as control was started.

    Seconds, bytes a second, and replicas that are filled at once.
    """

    replace_after_s: float | None = None
    rebuild_rate_bytes: int | None = None
    rebuilds: int | None = None
    rebuilds_per_node: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedMove:
    """A replica that is to go to another node when its turn comes."""

    volume: VolumeId
    segment: SegmentNumber
    replica: ReplicaId
    to_node: NodeId
    why: str


@dataclass(frozen=True, slots=True)
class MovePlan:
    """Moves that somebody asked for, in their order."""

    moves: tuple[PlannedMove, ...] = ()


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """A front-end that registered. instance: of its latest start."""

    id: FrontEndId
    instance: str
    address: str
    uris: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A replica to be deleted. Nothing is ever deleted on a node only because the catalog lacks it."""

    replica: ReplicaId
    node: NodeId
    volume: VolumeId
    segment: SegmentNumber


@dataclass(frozen=True, slots=True)
class Known:
    """The highest position that a replica is known to have acked (design, section 3, rule 10)."""

    replica: ReplicaId
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class KnownPositions:
    """Those of a volume's replicas; a record of its own, because it changes with every write."""

    volume: VolumeId
    positions: tuple[Known, ...]


def source_of(volume: Volume, number: SegmentNumber) -> str:
    """The snapshot that a segment's replicas are made from, also once it is hydrated; empty where that ends before it.

    A segment that has nothing of it is never hydrated, so no record of its log would ever say that it is.
    """
    starts_at = sum(each.size_bytes for each in volume.segments if each.number < number)
    return volume.origin if starts_at < max(volume.origin_size_bytes, 1) else ""


def check_size(size_bytes: int) -> None:
    """Raises InvalidRequest unless a volume may have this size."""
    if not 0 < size_bytes <= MAX_VOLUME_SIZE or size_bytes % BLOCK_SIZE:
        raise InvalidRequest(
            f"a volume of {size_bytes} bytes: the size must be a multiple of {BLOCK_SIZE}, "
            f"from {BLOCK_SIZE} to {MAX_VOLUME_SIZE}"
        )


def check_name(name: str) -> None:
    """Raises InvalidRequest unless a volume may have this name; it may be empty, and never looks like an id."""
    if name and (not _NAME.fullmatch(name) or _ID_LIKE.fullmatch(name)):
        raise InvalidRequest(
            f"{name!r} is no name for a volume: 1 to 128 letters, digits, dots, dashes and underscores, "
            "the first a letter or digit, and no id"
        )


def check_client(client: str) -> None:
    """Raises InvalidRequest unless a host may call itself so; empty is nobody in particular."""
    if client and not _NAME.fullmatch(client):
        raise InvalidRequest(
            f"{client!r} is no name for a client: 1 to 128 letters, digits, dots, dashes and underscores, "
            "the first a letter or digit"
        )


def check_tags(tags: Mapping[str, str]) -> None:
    """Raises InvalidRequest where there are too many tags, or one is too long."""
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"{len(tags)} tags are more than {MAX_TAGS}")
    for key, value in tags.items():
        if not 0 < len(key) <= MAX_TAG_KEY or len(value) > MAX_TAG_VALUE:
            raise InvalidRequest(
                f"tag {key!r}: keys have 1 to {MAX_TAG_KEY} characters, values {MAX_TAG_VALUE} at most"
            )


def check_token(token: str) -> None:
    """Raises InvalidRequest for a client token that is too long."""
    if len(token) > MAX_TOKEN:
        raise InvalidRequest(f"a client token of {len(token)} characters is longer than {MAX_TOKEN}")


def check_zone(zone: str) -> None:
    """Raises InvalidRequest unless a node may give this as its failure domain."""
    if not 0 < len(zone) <= MAX_ZONE or not zone.isprintable():
        raise InvalidRequest(f"{zone!r} is no name for a zone: 1 to {MAX_ZONE} printable characters")


def check_front_end(instance: str, uris: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless a front-end may register so."""
    if not 0 < len(instance) <= MAX_INSTANCE:
        raise InvalidRequest(f"an instance of {len(instance)} characters: expected 1 to {MAX_INSTANCE}")
    if len(uris) > MAX_URIS or any(not 0 < len(uri) <= MAX_URI for uri in uris):
        raise InvalidRequest(f"{len(uris)} NBD addresses: at most {MAX_URIS}, each of 1 to {MAX_URI} characters")
