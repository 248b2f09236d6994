"""Adopt: the catalog's snapshots, recovered from the object store alone.

For each snapshot with a root that opens with our key and whose content is whole, control is told what the root says of
itself. What it knows already stays as it is, so adopting may be repeated at any time. A root that does not open, or
that refers to something that is gone, is a problem of its own and stops nobody else. A snapshot that this very cluster
deleted stays deleted: prune removes a root of it that was put too late.

Of several roots of one snapshot (snapshotd.root_objects) the lost catalog had one. The others are of attempts that did
not complete it, or not first; each was written last, with the same content, as a snapshot's content never changes.
So the first of which everything is there to stay is as good as that one, and the rest become what prune removes.
"""

import hashlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import SnapshotId
from blockstore.errors import AlreadyExists, Conflict, Corrupt, Fenced, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.layout import SNAPSHOTS, RootName, root_name
from snapshotd.references import damage_of
from snapshotd.repository import Repository
from snapshotd.root import Root, decode_root
from snapshotd.roots import Catalog
from snapshotd.survey import Problems
from snapshotd.vouch import vouch

#: Prunes that may begin while one root is looked at.
_MAX_TRIES: Final = 5
#: What is wrong with one root, and no reason to stop.
_UNFIT: Final = (Corrupt, NotFound, Conflict, AlreadyExists, InvalidRequest)


@dataclass(slots=True)
class Adopted:
    """done of total snapshots; snapshots: known to control now that were not before."""

    done: int = 0
    total: int = 0
    snapshots: list[SnapshotId] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


async def adopt(repository: Repository, catalog: Catalog) -> AsyncGenerator[Adopted, None]:
    """Adopt all roots that are there; the same object each time, further on. Raises QuorumUnavailable."""
    adopted = Adopted()
    found: dict[SnapshotId, list[RootName]] = {}
    async for info in repository.store.list(SNAPSHOTS):
        name = root_name(info.key)
        if name is None:
            adopted.problems.add(info.key, f"{info.key} is no name of a root", [])
        else:
            found.setdefault(SnapshotId(name.snapshot), []).append(name)
    adopted.total = len(found)
    known = await catalog.snapshots()
    deleted = await catalog.deleted(found.keys() - known.keys())
    for snapshot, roots in found.items():
        if snapshot not in known and snapshot not in deleted:
            await _adopt_one(repository, catalog, snapshot, roots, adopted)
        adopted.done += 1
        yield adopted
    if adopted.problems and not found:
        yield adopted


async def _adopt_one(
    repository: Repository, catalog: Catalog, snapshot: SnapshotId, roots: Iterable[RootName], adopted: Adopted
) -> None:
    """By the first of its roots that will do; what is wrong with others is told only where none will."""
    problems = []
    for name in roots:
        try:
            stored = await repository.store.get(name.key)
            root = decode_root(repository.keys, snapshot, stored, name.digest)
            await add_to_catalog(repository, catalog, root, hashlib.sha256(stored).digest())
        except _UNFIT as error:
            problems.append(damage_of(error, name.key))
        else:
            adopted.snapshots.append(snapshot)
            return
    for damaged, message in problems:
        adopted.problems.add(damaged, message, [snapshot])


async def add_to_catalog(repository: Repository, catalog: Catalog, root: Root, digest: bytes) -> pb.Snapshot:
    """Make a stored snapshot known to control, once all that it refers to is there to stay. digest: of its root.

    Raises Conflict where something has gone, AlreadyExists where control knows it with another root.
    """
    for _ in range(_MAX_TRIES):
        number = await vouch(repository, catalog, root, digest)
        try:
            return await catalog.add(to_snapshot(root, digest), number)
        except Fenced:
            continue  # a prune began meanwhile: look again
    raise Conflict(f"prunes begin all the time: {root.snapshot} could not be made known to control; try again")


def to_snapshot(root: Root, digest: bytes) -> pb.Snapshot:
    """What control is told of a completed snapshot."""
    statistics = root.statistics
    return pb.Snapshot(
        id=root.snapshot,
        volume=root.volume,
        volume_name=root.volume_name,
        size_bytes=root.size_bytes,
        state=pb.SNAPSHOT_STATE_COMPLETED,
        description=root.description,
        tags=dict(root.tags),
        created_at_ms=root.created_at_ms,
        sealed_at_ms=root.sealed_at_ms,
        completed_at_ms=root.completed_at_ms,
        parent=root.parent,
        barrier=root.barrier,
        generation=root.generation,
        pause_us=root.pause_us,
        root=digest,
        statistics=pb.SnapshotStatistics(
            logical_bytes=statistics.logical_bytes,
            changed_bytes=statistics.changed_bytes,
            deduplicated_bytes=statistics.deduplicated_bytes,
            stored_bytes=statistics.stored_bytes,
        ),
    )


def to_message(adopted: Adopted) -> pb.AdoptResponse:
    """One message of the stream; the names only once all are there."""
    ended = adopted.done == adopted.total
    return pb.AdoptResponse(
        progress=pb.WorkProgress(phase="snapshots", done=adopted.done, total=adopted.total, unit="snapshots"),
        snapshots=adopted.snapshots if ended else (),
        problems=adopted.problems.messages() if ended else (),
    )
