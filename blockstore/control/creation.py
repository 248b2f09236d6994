"""New volumes: checked, placed, entered in the catalog, and waited for; empty, or made from a snapshot."""

from collections.abc import Mapping
from typing import Final

import structlog

from blockstore.control.catalog import Catalog
from blockstore.control.clock import now_ms
from blockstore.control.metastore.interface import Revision
from blockstore.control.placing import Placing, new_segments, random_id
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.record_store import MAX_TRIES
from blockstore.control.records import (
    Segment,
    Source,
    Volume,
    check_name,
    check_size,
    check_tags,
    check_token,
)
from blockstore.control.segment_plan import check_segment_size, cut
from blockstore.control.snapshot_catalog import SnapshotCatalog, key_of
from blockstore.control.snapshot_transitions import check_completed
from blockstore.domain import VolumeId, VolumeState
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
        placing: Placing,
        *,
        segment_size_bytes: int,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._placing = placing
        self._segment_size_bytes = segment_size_bytes

    async def enter(self, request: control_pb2.CreateVolumeRequest) -> Volume:
        """A new volume in the catalog, or that of an earlier request with the same token."""
        _check(request)
        for _ in range(MAX_TRIES):
            if earlier := await self._catalog.volume_of_token(request.client_token):
                return _checked_earlier(earlier, request)
            source, size_bytes, unchanged = await self._source(request)
            check_size(size_bytes)
            segment_size_bytes = request.segment_size_bytes or self._segment_size_bytes
            sizes = cut(size_bytes, segment_size_bytes)
            placed = await self._placing.place(sizes)
            volume = _new_volume(request, new_segments(placed.nodes, sizes), source, segment_size_bytes)
            if await self._catalog.add_volume(volume, placed.on, unchanged):
                nodes = [each.record.id for each in placed.on]
                _log.info("volume is to be created", volume=volume.id, nodes=nodes, source=volume.origin)
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


def _check(request: control_pb2.CreateVolumeRequest) -> None:
    if not request.snapshot or request.size_bytes:
        check_size(request.size_bytes)
    check_name(request.name)
    check_tags(request.tags)
    check_token(request.client_token)
    if request.segment_size_bytes:
        check_segment_size(request.segment_size_bytes)
    if request.init_rate_bytes and not request.snapshot:
        raise InvalidRequest(f"a rate of {request.init_rate_bytes} bytes/s and no snapshot to copy from: leave it out")


def _checked_earlier(earlier: Volume, request: control_pb2.CreateVolumeRequest) -> Volume:
    size_bytes = request.size_bytes or earlier.size_bytes
    if (earlier.size_bytes, earlier.name, earlier.origin) != (size_bytes, request.name, request.snapshot):
        raise Conflict(f"client token {request.client_token!r} was used for another volume, {earlier.id}")
    return earlier


def _new_volume(
    request: control_pb2.CreateVolumeRequest,
    segments: tuple[Segment, ...],
    source: Source | None,
    segment_size_bytes: int,
) -> Volume:
    return Volume(
        id=VolumeId(random_id("vol")),
        name=request.name,
        size_bytes=sum(each.size_bytes for each in segments),
        state=VolumeState.CREATING,
        created_at_ms=now_ms(),
        segments=segments,
        tags=dict(request.tags),
        client_token=request.client_token,
        source=source,
        origin=source.snapshot if source else "",
        segment_size_bytes=segment_size_bytes,
        origin_size_bytes=source.size_bytes if source else 0,
    )
