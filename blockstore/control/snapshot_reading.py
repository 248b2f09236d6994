"""What front-ends ask to show a snapshot to NBD clients, and where people find it.

Whoever reads a snapshot keeps it, as a volume that comes from it does: one that is deleted meanwhile stays
`deleting`, with its root in the object store and its generation pinned, until nobody reads it any more. Front-ends
say what they read with each heartbeat, and before they open one; a word holds for a lease, in memory only, so one
that dies lets go by itself. Invariant: a front-end's word stands before it is told that a snapshot can be read.
So whatever deletes either sees the word, or has marked the snapshot before, and then the front-end is refused.
"""

from blockstore.control.catalog import Catalog
from blockstore.control.messages import export_uri
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.registrar import Registrar
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_messages import bare_message
from blockstore.control.snapshot_records import Snapshot
from blockstore.control.snapshot_transitions import is_readable
from blockstore.domain import SnapshotId, check_id
from blockstore.errors import Conflict
from blockstore.rpc import control_pb2, snapshot_pb2


async def readers_are_known(catalog: Catalog, presence: Presence) -> bool:
    """Every front-end that may be up has said what it reads: right after a start of control some have not yet."""
    return not presence.settling_s() or all(presence.is_up(each.id) for each in await catalog.front_ends())


class SnapshotReading:
    """Who may read what, from where."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        reconciler: Reconciler,
        registrar: Registrar,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._reconciler = reconciler
        self._registrar = registrar

    async def open(self, request: snapshot_pb2.OpenSnapshotRequest) -> snapshot_pb2.OpenSnapshotResponse:
        """Where its content is. Raises NotFound, Fenced, and Conflict where it has none, or is being deleted."""
        await self._registrar.instance(request.front_end, request.instance)
        wanted = SnapshotId(check_id("snap", request.snapshot))
        self._presence.snapshots_read([wanted])
        snapshot = await self._snapshots.snapshot(wanted)
        if not is_readable(snapshot, again=request.again):
            why = f" ({snapshot.reason})" if snapshot.reason else ""
            raise Conflict(f"snapshot {snapshot.id} is {snapshot.state.value}{why}: it has no content to be shown")
        if snapshot.root:
            return snapshot_pb2.OpenSnapshotResponse(
                snapshot=bare_message(snapshot), source=await self._stored(snapshot)
            )
        return await self._sealed(snapshot)

    async def uris(self, snapshot: Snapshot) -> list[str]:
        """Where NBD clients find it now: at any front-end that is up and shows snapshots."""
        if not is_readable(snapshot):
            return []
        found = []
        for each in await self._catalog.front_ends():
            word = self._presence.front_end(each.id)
            if word and word.shows_snapshots and self._presence.is_up(each.id):
                found += [export_uri(uri, snapshot.id) for uri in each.uris]
        return found

    async def _stored(self, snapshot: Snapshot) -> control_pb2.Source:
        """In the object store."""
        daemons = await self._snapshots.daemons()
        return control_pb2.Source(
            snapshot=snapshot.id,
            root=bytes.fromhex(snapshot.root),
            size_bytes=snapshot.size_bytes,
            addresses=[each.address for each in daemons if self._presence.is_up(each.id)],
        )

    async def _sealed(self, snapshot: Snapshot) -> snapshot_pb2.OpenSnapshotResponse:
        """On the nodes, and of the snapshot that its volume came from. The volume may be there no more: NotFound."""
        volume, messages = await self._catalog.volume(snapshot.volume), await self._reconciler.messages()
        needed = volume.source.snapshot if volume.source else snapshot.source
        source = None
        if needed:
            self._presence.snapshots_read([SnapshotId(needed)])
            source = await self._stored(await self._snapshots.snapshot(needed))
        return snapshot_pb2.OpenSnapshotResponse(
            snapshot=bare_message(snapshot),
            source=source,
            segments=messages.volume(volume).segments,
            generations=snapshot.generations,
            seal_name=snapshot.seal_name,
        )
