"""New volumes: checked, placed, entered in the catalog, and waited for; empty, or made from a snapshot."""

import secrets
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from blockstore.config import Placement
from blockstore.control.catalog import Catalog, nodes_of
from blockstore.control.clock import now_ms
from blockstore.control.metastore.interface import Revision
from blockstore.control.placement import Candidate, Placed, place
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.record_store import MAX_TRIES, Stored
from blockstore.control.records import (
    Node,
    Segment,
    Source,
    Volume,
    check_name,
    check_size,
    check_tags,
    check_token,
)
from blockstore.control.snapshot_catalog import SnapshotCatalog, key_of
from blockstore.control.snapshot_transitions import check_completed
from blockstore.domain import Configuration, Member, NodeId, ReplicaId, SegmentNumber, VolumeId, VolumeState, make_id
from blockstore.errors import CairnError, Conflict, InvalidRequest
from blockstore.rpc import control_pb2

_log = structlog.get_logger(__name__)

#: How long CreateVolume waits for the volume to be available before it answers `creating`.
CREATE_WAIT_S: Final = 5.0


class Creation:
    """Makes volumes."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        reconciler: Reconciler,
        placement: Placement,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._placement = placement

    async def enter(self, request: control_pb2.CreateVolumeRequest) -> Volume:
        """A new volume in the catalog, or that of an earlier request with the same token."""
        _check(request)
        for _ in range(MAX_TRIES):
            if earlier := await self._catalog.volume_of_token(request.client_token):
                return _checked_earlier(earlier, request)
            source, size_bytes, unchanged = await self._source(request)
            check_size(size_bytes)
            placed, nodes = await self._place()
            volume = _new_volume(request, placed, size_bytes, source)
            if await self._catalog.add_volume(volume, [nodes[node] for node in placed.nodes], unchanged):
                _log.info("volume is to be created", volume=volume.id, nodes=placed.nodes, source=volume.origin)
                return volume
        raise Conflict("the catalog is changed by too many at once: try again")

    async def until_created(self, volume: Volume) -> Volume:
        """The volume when it is no longer being created. A node that is away may come back meanwhile."""
        while volume.state is VolumeState.CREATING:
            try:
                await self._reconciler.settle(volume)
            except CairnError:
                _log.debug("not created yet", volume=volume.id)
            volume = await self._catalog.volume(volume.id)
            if volume.state is VolumeState.CREATING:
                await self._presence.next_beat(CREATE_WAIT_S)
        return volume

    async def _source(
        self, request: control_pb2.CreateVolumeRequest
    ) -> tuple[Source | None, int, Mapping[str, Revision]]:
        """What it is made from, its size, and what must still be so when it is entered."""
        if not request.snapshot:
            return None, request.size_bytes, {}
        stored = await self._snapshots.stored(request.snapshot)
        snapshot = stored.record
        check_completed(snapshot)
        size_bytes = request.size_bytes or snapshot.size_bytes
        if size_bytes < snapshot.size_bytes:
            raise InvalidRequest(
                f"a volume of {size_bytes} bytes is smaller than snapshot {snapshot.id} of {snapshot.size_bytes}: "
                "take its size or more"
            )
        source = Source(snapshot.id, snapshot.root, snapshot.size_bytes, request.init_rate_bytes)
        return source, size_bytes, {key_of(snapshot.id): stored.revision}

    async def _place(self) -> tuple[Placed, dict[NodeId, Stored[Node]]]:
        """Where a volume goes. Right after a start of control, nodes that are up may not have been heard yet."""
        while True:
            nodes = {each.record.id: each for each in await self._catalog.nodes()}
            draining = await self._catalog.draining()
            open_nodes = [each.record for each in nodes.values() if each.record.id not in draining]
            candidates = self._candidates(open_nodes, await self._catalog.volumes())
            settling_s = self._presence.settling_s()
            try:
                placed = place(candidates, self._placement)
                if not settling_s or (len(candidates) == len(open_nodes) and not placed.warnings):
                    return placed, nodes
            except CairnError:
                if not settling_s:
                    raise
            await self._presence.next_beat(settling_s)

    def _candidates(self, nodes: Iterable[Node], volumes: tuple[Volume, ...]) -> list[Candidate]:
        found = []
        for node in nodes:
            word = self._presence.node(node.id)
            if word is None or not self._presence.is_up(node.id):
                continue
            promised = sum(volume.size_bytes for volume in volumes if node.id in nodes_of(volume))
            found.append(Candidate(node.id, node.zone, word.capacity_bytes, word.used_bytes, promised, word.full))
        return found


def _check(request: control_pb2.CreateVolumeRequest) -> None:
    if not request.snapshot or request.size_bytes:
        check_size(request.size_bytes)
    check_name(request.name)
    check_tags(request.tags)
    check_token(request.client_token)
    if request.init_rate_bytes and not request.snapshot:
        raise InvalidRequest(f"a rate of {request.init_rate_bytes} bytes/s and no snapshot to copy from: leave it out")


def _checked_earlier(earlier: Volume, request: control_pb2.CreateVolumeRequest) -> Volume:
    size_bytes = request.size_bytes or earlier.size_bytes
    if (earlier.size_bytes, earlier.name, earlier.origin) != (size_bytes, request.name, request.snapshot):
        raise Conflict(f"client token {request.client_token!r} was used for another volume, {earlier.id}")
    return earlier


def _new_volume(
    request: control_pb2.CreateVolumeRequest, placed: Placed, size_bytes: int, source: Source | None
) -> Volume:
    members = tuple(Member(ReplicaId(random_id("rep")), node) for node in placed.nodes)
    return Volume(
        id=VolumeId(random_id("vol")),
        name=request.name,
        size_bytes=size_bytes,
        state=VolumeState.CREATING,
        created_at_ms=now_ms(),
        segments=(Segment(SegmentNumber(0), size_bytes, Configuration(1, members)),),
        tags=dict(request.tags),
        warnings=placed.warnings,
        client_token=request.client_token,
        source=source,
        origin=source.snapshot if source else "",
    )


def random_id(prefix: str) -> str:
    """A new id of that kind."""
    return make_id(prefix, secrets.token_bytes(9))
