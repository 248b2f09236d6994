"""Adopt: the catalog's snapshots, recovered from the object store alone.

For each root that opens with our key and whose content is whole, control is told what the root says of itself. What
it knows already stays as it is, so adopting may be repeated at any time. A root that does not open, or that
refers to something that is gone, is a problem of its own and stops nobody else.
"""

import hashlib
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, field
from typing import Final

from blockstore.domain import SnapshotId
from blockstore.errors import AlreadyExists, Conflict, Corrupt, Fenced, InvalidRequest, NotFound
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.layout import SNAPSHOTS, name_of_key, root_key
from snapshotd.references import damage_of
from snapshotd.repository import Repository
from snapshotd.root import Root, decode_root
from snapshotd.roots import Catalog
from snapshotd.survey import Problems
from snapshotd.vouch import vouch

#: Prunes that may begin while one root is looked at.
_MAX_TRIES: Final = 5


@dataclass(slots=True)
class Adopted:
    """done of total roots; snapshots: known to control now that were not before."""

    done: int = 0
    total: int = 0
    snapshots: list[SnapshotId] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


async def adopt(repository: Repository, catalog: Catalog) -> AsyncGenerator[Adopted, None]:
    """Adopt all roots that are there; the same object each time, further on. Raises QuorumUnavailable."""
    keys = [info.key async for info in repository.store.list(SNAPSHOTS)]
    adopted = Adopted(total=len(keys))
    known = await catalog.snapshots()
    for key in keys:
        try:
            snapshot = await _adopt_one(repository, catalog, known, key)
            if snapshot is not None:
                adopted.snapshots.append(snapshot)
        except (Corrupt, NotFound, Conflict, AlreadyExists, InvalidRequest) as error:
            damaged, message = damage_of(error, key)
            adopted.problems.add(damaged, message, [name_of_key(key)])
        adopted.done += 1
        yield adopted


async def _adopt_one(
    repository: Repository, catalog: Catalog, known: Collection[SnapshotId], key: str
) -> SnapshotId | None:
    """The snapshot, if control did not know it."""
    snapshot = SnapshotId(name_of_key(key))
    if key != root_key(snapshot):
        raise InvalidRequest(f"{key} is no name of a root")
    if snapshot in known:
        return None
    stored = await repository.store.get(key)
    root = decode_root(repository.keys, snapshot, stored)
    await add_to_catalog(repository, catalog, root, hashlib.sha256(stored).digest())
    return snapshot


async def add_to_catalog(repository: Repository, catalog: Catalog, root: Root, digest: bytes) -> pb.Snapshot:
    """Make a stored snapshot known to control, once all that it refers to is there to stay. digest: of its root.

    Raises Conflict where something has gone, AlreadyExists where control knows it with another root.
    """
    for _ in range(_MAX_TRIES):
        number = await vouch(repository, catalog, root)
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
