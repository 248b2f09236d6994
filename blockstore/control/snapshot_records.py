"""What the catalog keeps of snapshots: their records, the daemons that ship them, the store, pins to be taken away.

The content of a snapshot is in the object store; here stands what it is of, how far it is, and what
vouches for it. Roots are texts of hexadecimal digits, because records are JSON. The field names are
the stored format (blockstore/control/codec.py). Times are milliseconds since 1970, UTC.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from blockstore.control.records import MAX_INSTANCE
from blockstore.domain import DaemonId, SnapshotId, VolumeId
from blockstore.errors import InvalidRequest

#: Each is at most three changes, and two conditions, of one transaction of the metastore, which takes 120 of each.
MAX_VOLUMES: Final = 32
MAX_DESCRIPTION: Final = 1024
MAX_REASON: Final = 1024
MAX_STORE: Final = 1024
MAX_REPOSITORY: Final = 128
#: Bytes of a SHA-256.
ROOT_SIZE: Final = 32


class SnapshotState(Enum):
    """As EBS has them, and `deleting`."""

    PENDING = "pending"
    COMPLETED = "completed"
    ERROR = "error"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True)
class Statistics:
    """How much a completed snapshot is, in bytes; as in snapshot.proto."""

    logical_bytes: int = 0
    changed_bytes: int = 0
    deduplicated_bytes: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Seal:
    """Of one segment: the generation that was sealed, by the record at position (epoch, sequence) of its log."""

    generation: int
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot as the catalog knows it.

    sealed_at_ms: when its content was fixed, 0 before that; by the record at position (seal_epoch,
    seal_sequence) of its first segment's log; further_seals: of the other segments, in their order. Each segment
    numbers its generations by itself; of two snapshots of a volume the one with the newer generation in the first
    segment is the newer one, because one barrier seals all segments. pinned: its generation is to be kept by
    the volume's replicas, for a ship to come or as base of the next one. touched: a daemon was ever told
    to ship it, so that there may be something of it in the object store. retries: how often it was in error and
    is to be shipped all the same, which names the present try. started: of that try;
    `parent` and `base_generation` are then what it ships the changes since; further_bases: those of the other
    segments. barrier: one text for all snapshots of one instant, also for one of a volume of several segments.
    tries: of the barrier that have failed; sealed_as: the name of the seals of the present one, where that is not its
    id. root: of its root object, once completed. source: the snapshot that its volume came from and had not all of when
    this one was asked for, if any. What the nodes lack of its generations is that one's, for good: the volume is
    hydrated without the blocks that its guest wrote after the seal.
    """

    id: SnapshotId
    volume: VolumeId
    volume_name: str
    size_bytes: int
    state: SnapshotState
    created_at_ms: int
    reason: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    client_token: str = ""
    barrier: str = ""
    sealed_at_ms: int = 0
    generation: int = 0
    seal_epoch: int = 0
    seal_sequence: int = 0
    pause_us: int = 0
    pinned: bool = False
    touched: bool = False
    retries: int = 0
    started: bool = False
    parent: str = ""
    base_generation: int = 0
    completed_at_ms: int = 0
    root: str = ""
    statistics: Statistics = Statistics()
    further_seals: tuple[Seal, ...] = ()
    further_bases: tuple[int, ...] = ()
    tries: int = 0
    sealed_as: str = ""
    source: str = ""

    @property
    def seal_name(self) -> SnapshotId:
        """What replicas know its seals, and its pin, by."""
        return SnapshotId(self.sealed_as) if self.sealed_as else self.id

    @property
    def seals(self) -> tuple[Seal, ...]:
        """Of all segments that it has, in their order."""
        return Seal(self.generation, self.seal_epoch, self.seal_sequence), *self.further_seals

    @property
    def generations(self) -> tuple[int, ...]:
        """Of all segments that it has, in their order."""
        return tuple(each.generation for each in self.seals)

    @property
    def bases(self) -> tuple[int, ...]:
        """What it ships the changes since, of all segments that it has; 0 in one that the base does not have."""
        bases = (self.base_generation, *self.further_bases)
        return (bases + (0,) * len(self.seals))[: len(self.seals)]


@dataclass(frozen=True, slots=True)
class StoreDaemon:
    """A snapshotd that registered. instance: of its latest start. store: a URL without secrets."""

    id: DaemonId
    instance: str
    address: str
    store: str
    repository: str


@dataclass(frozen=True, slots=True)
class Store:
    """The one object store of this cluster.

    cluster: names this cluster to the repository, for good. repository: claimed by the first daemon
    that registered, empty before that. prune_number: raised by each prune before it deletes anything; no snapshot
    completes whose references were checked at an older one (design, section 5).
    """

    cluster: str
    repository: str = ""
    prune_number: int = 0


@dataclass(frozen=True, slots=True)
class Pin:
    """A pin that the volume's replicas are to drop. generation: 0 where it is not known which was sealed, if any.

    snapshot: the name of its seals (Snapshot.seal_name). generation: of the first segment; further_generations: of the
    others, in their order.
    """

    volume: VolumeId
    snapshot: SnapshotId
    generation: int
    further_generations: tuple[int, ...] = ()


def check_description(description: str) -> None:
    """Raises InvalidRequest for one that is too long."""
    if len(description) > MAX_DESCRIPTION:
        raise InvalidRequest(f"a description of {len(description)} characters is longer than {MAX_DESCRIPTION}")


def check_root(root: bytes) -> str:
    """The text of a root's hash. Raises InvalidRequest unless it is a SHA-256."""
    if len(root) != ROOT_SIZE:
        raise InvalidRequest(f"a root of {len(root)} bytes: expected the {ROOT_SIZE} bytes of a SHA-256")
    return root.hex()


def check_daemon(instance: str, store: str, repository: str) -> None:
    """Raises InvalidRequest unless a daemon may register so."""
    for name, text, least, most in (
        ("instance", instance, 1, MAX_INSTANCE),
        ("store", store, 1, MAX_STORE),
        ("repository", repository, 0, MAX_REPOSITORY),
    ):
        if not least <= len(text) <= most:
            raise InvalidRequest(f"{name} of a daemon has {len(text)} characters: expected {least} to {most}")
