"""What control says must be kept: the roots, the snapshots that are still pending, and the prune number.

The three belong to one revision of the catalog. The number is the only thing that prunes and writers
agree on (there is no clock): a prune raises it after its quarantine is in the object store, and a
snapshot completes only while the number is the one at which its references were checked. So whoever
completed before the raise is among the roots that the prune reads after it, and whoever completes
later has seen the quarantine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from blockstore.domain import SnapshotId
from blockstore.errors import QuorumUnavailable
from blockstore.grpc_errors import cairn_errors
from blockstore.grpc_parts import whole
from blockstore.rpc import snapshot_pb2 as pb

#: Of one call to control; it answers from its metastore.
_TIMEOUT_S: Final = 30.0
#: Ids of one FindDeleted: control asks etcd for each, and many are asked for after a lost catalog only.
_IDS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Roots:
    """number: the prune number. completed: snapshot -> SHA-256 of its root. pending: their packs are kept whole."""

    number: int
    completed: Mapping[SnapshotId, bytes]
    pending: frozenset[SnapshotId] = frozenset()


class Catalog(Protocol):
    """The part of control that the object store's upkeep needs."""

    async def roots(self) -> Roots:
        """Completed snapshots, deleted ones that volumes still come from, pending ones: of one revision."""

    async def prune_number(self) -> int:
        """The prune number alone."""

    async def raise_number(self, expected: int) -> int:
        """The number is `expected` + 1 from here on. Raises Fenced where it was another one: somebody else prunes."""

    async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
        """Enter one that is whole in the object store, unless the number moved (Fenced).

        Raises AlreadyExists where the catalog has it with another root.
        """

    async def snapshots(self) -> Mapping[SnapshotId, pb.Snapshot]:
        """All that the catalog has, in every state."""

    async def deleted(self, snapshots: Iterable[SnapshotId]) -> frozenset[SnapshotId]:
        """Those of them that were deleted. None of them ever comes back, so that holds of any later time, too."""


class ControlCatalog:
    """Control, asked over gRPC. stub: of service Snapshots. daemon: the id of this snapshotd."""

    def __init__(self, stub: Any, daemon: str) -> None:
        self._stub = stub
        self._daemon = daemon

    async def roots(self) -> Roots:
        with cairn_errors("control"):
            answer = await whole(self._stub.GetRoots(pb.GetRootsRequest(), timeout=_TIMEOUT_S))
        if (count := len(answer.roots) + len(answer.pending)) != answer.total:
            raise QuorumUnavailable(f"control's list of roots has {count} of {answer.total} entries: ask again")
        completed = {SnapshotId(each.snapshot): each.root for each in answer.roots}
        return Roots(answer.prune_number, completed, frozenset(SnapshotId(each) for each in answer.pending))

    async def prune_number(self) -> int:
        with cairn_errors("control"):
            answer = await self._stub.GetPruneNumber(pb.GetPruneNumberRequest(), timeout=_TIMEOUT_S)
        number: int = answer.prune_number
        return number

    async def raise_number(self, expected: int) -> int:
        request = pb.RaisePruneNumberRequest(daemon=self._daemon, expected=expected)
        with cairn_errors("control"):
            number: int = (await self._stub.RaisePruneNumber(request, timeout=_TIMEOUT_S)).prune_number
        return number

    async def add(self, snapshot: pb.Snapshot, number: int) -> pb.Snapshot:
        request = pb.AddSnapshotRequest(snapshot=snapshot, prune_number=number)
        with cairn_errors("control"):
            added: pb.Snapshot = await self._stub.AddSnapshot(request, timeout=_TIMEOUT_S)
        return added

    async def snapshots(self) -> Mapping[SnapshotId, pb.Snapshot]:
        with cairn_errors("control"):
            answer = await whole(self._stub.ListSnapshots(pb.ListSnapshotsRequest(), timeout=_TIMEOUT_S))
        return {SnapshotId(each.id): each for each in answer.snapshots}

    async def deleted(self, snapshots: Iterable[SnapshotId]) -> frozenset[SnapshotId]:
        asked, found = list(snapshots), set[SnapshotId]()
        for at in range(0, len(asked), _IDS):
            request = pb.FindDeletedRequest(snapshots=asked[at : at + _IDS])
            with cairn_errors("control"):
                answer = await self._stub.FindDeleted(request, timeout=_TIMEOUT_S)
            found.update(SnapshotId(each) for each in answer.snapshots)
        return frozenset(found)
