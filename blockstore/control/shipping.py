"""Which snapshotd ships what, in which order, as a change of what.

One snapshot of a volume at a time, the oldest content first, so that each can be a change of the one
before it. What a snapshot is shipped as a change of is kept with it before a daemon hears of it, and
does not change until it is retried. Invariants: a base is completed (or is the source of a volume that
is not hydrated, or was not when the snapshot was asked for), and stays in the object store while something is shipped
as a change of it; a root is dropped only when no volume, no ship under way or to come and no reader needs it, and no
daemon ships that snapshot.
Who ships what is in memory only: after a restart of control the daemons say it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Final

import structlog

from blockstore.control import snapshot_transitions
from blockstore.control.catalog import Catalog
from blockstore.control.messages import Messages
from blockstore.control.metastore.interface import Revision
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON
from blockstore.control.records import Volume
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import SnapshotCatalog, key_of, key_of_volume
from blockstore.control.snapshot_messages import bare_message
from blockstore.control.snapshot_reading import readers_are_known
from blockstore.control.snapshot_records import Snapshot, SnapshotState
from blockstore.control.snapshot_transitions import Phase, phase_of
from blockstore.domain import DaemonId, SnapshotId, VolumeId
from blockstore.errors import Conflict, Fenced, NotFound
from blockstore.rpc import snapshot_pb2
from blockstore.units import Epoch

_log = structlog.get_logger(__name__)

#: Ships that one daemon has at once: it works on a few, and each is a record of some hundred bytes in the answer
#: to every heartbeat, which is one message.
MAX_SHIPS: Final = 512
#: Roots that one answer names to be deleted; who has deleted them is told the next ones.
MAX_DROPS: Final = 512


class Shipping:
    """What is to be shipped and dropped, and by whom."""

    def __init__(self, catalog: Catalog, snapshots: SnapshotCatalog, presence: Presence) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._given: dict[SnapshotId, DaemonId] = {}

    async def reconcile(self, roster: Roster) -> None:
        """Forget deleted snapshots of which the object store has nothing; fail those whose volume is gone."""
        unfinished = await self._snapshots.unfinished()
        for snapshot in unfinished:
            with suppress(*MOVED_ON):
                await self._tidy_up(snapshot, roster.by_id)
        self._forget_others(unfinished)

    async def tasks(
        self, daemon: DaemonId, reported: Iterable[SnapshotId], messages: Messages
    ) -> list[snapshot_pb2.ShipTask]:
        """All that this daemon is to ship now. reported: what it says that it ships."""
        ready = next_of_each_volume(await self._snapshots.unfinished())
        self._give(daemon, ready, set(reported), await self._all_heard())
        tasks = []
        for snapshot in ready:
            if self._given.get(snapshot.id) == daemon:
                try:
                    tasks.append(await self._task(snapshot, messages))
                except (Fenced, Conflict, NotFound) as error:
                    _log.info("not given to a daemon yet", snapshot=snapshot.id, error=str(error))
        return tasks

    async def drops(self) -> list[SnapshotId]:
        """The deleted snapshots whose roots may leave the object store now.

        None while it is not known who reads which.
        """
        if not await readers_are_known(self._catalog, self._presence):
            return []
        deleting = [each.id for each in await self._snapshots.unfinished() if phase_of(each) is Phase.DELETING]
        needed = await self._needed() if deleting else frozenset()
        return [each for each in deleting if each not in needed][:MAX_DROPS]

    async def check_free(self, snapshot: Snapshot) -> None:
        """Raises Conflict where its root must not be dropped."""
        if phase_of(snapshot) is not Phase.DELETING or snapshot.id in await self._needed():
            raise Conflict(f"snapshot {snapshot.id} is needed ({snapshot.state.value}): its root must stay")

    def check_given(self, snapshot: SnapshotId, daemon: DaemonId) -> None:
        """Raises Fenced where another daemon, which is up, ships it by now."""
        given = self._given.get(snapshot, daemon)
        if given != daemon and self._presence.is_up(given):
            raise Fenced(f"snapshot {snapshot} was given to {given} while {daemon} was silent: leave it")

    def progress(self, snapshot: SnapshotId) -> snapshot_pb2.ShipProgress | None:
        """What the daemon that ships it said last; None where none does."""
        daemon = self._given.get(snapshot)
        word = self._presence.daemon(daemon) if daemon and self._presence.is_up(daemon) else None
        return word.snapshots.get(snapshot) if word else None

    # ---- who

    async def _all_heard(self) -> bool:
        """Whoever ships something has said so; right after a start of control some may not have been heard yet."""
        daemons = await self._snapshots.daemons()
        return not self._presence.settling_s() or all(self._presence.is_up(each.id) for each in daemons)

    def _give(self, daemon: DaemonId, ready: list[Snapshot], reported: set[SnapshotId], all_heard: bool) -> None:
        """Each that nobody ships goes to whoever says that he ships it, or has the least."""
        mine = sum(each == daemon for each in self._given.values())
        for snapshot in ready:
            holder = self._given.get(snapshot.id)
            if holder == daemon or (holder and self._presence.is_up(holder)):
                continue
            if snapshot.id in reported or (all_heard and mine < MAX_SHIPS and mine <= self._least()):
                self._given[snapshot.id] = daemon
                mine += 1
                _log.info("a snapshot is given to a daemon", snapshot=snapshot.id, daemon=daemon)

    def _least(self) -> int:
        loads = Counter(each for each in self._given.values() if self._presence.is_up(each))
        return min((loads[each] for each in self._presence.daemons_up()), default=0)

    def _forget_others(self, snapshots: Iterable[Snapshot]) -> None:
        shipping = {each.id for each in snapshots if phase_of(each) is Phase.SHIPPING}
        for snapshot in self._given.keys() - shipping:
            del self._given[snapshot]

    async def _tidy_up(self, snapshot: Snapshot, volumes: Collection[VolumeId]) -> None:
        phase = phase_of(snapshot)
        if phase is Phase.DELETING and not (snapshot.touched or snapshot.root):
            await self._snapshots.remove(snapshot.id)
            _log.info("a snapshot that was never shipped is gone", snapshot=snapshot.id)
        elif phase is Phase.SHIPPING and snapshot.volume not in volumes:
            await self._fail_without_volume(snapshot)

    async def _fail_without_volume(self, snapshot: Snapshot) -> None:
        """Looks once more: the list of volumes may be older than the snapshot."""
        if not await self._catalog.has_volume(snapshot.volume):
            await self._snapshots.change(
                [snapshot.id],
                lambda now: snapshot_transitions.failed(now, "its volume is gone; delete it", retries=now.retries),
            )

    # ---- what

    async def _task(self, snapshot: Snapshot, messages: Messages) -> snapshot_pb2.ShipTask:
        stored = await self._catalog.stored_volume(snapshot.volume)
        if not snapshot.started:
            base, generations, unchanged = await self._choose_base(snapshot, stored.record, stored.revision)
            (snapshot,) = await self._snapshots.change(
                [snapshot.id], lambda now: snapshot_transitions.started(now, base, *generations), unchanged=unchanged
            )
        parent = await self._snapshots.snapshot(snapshot.parent) if snapshot.parent else None
        return snapshot_pb2.ShipTask(
            snapshot=bare_message(snapshot),
            segments=messages.segments(stored.record),
            base=snapshot.parent,
            base_root=bytes.fromhex(parent.root) if parent else b"",
            base_generation=snapshot.base_generation,
            retries=snapshot.retries,
            generations=snapshot.generations,
            base_generations=snapshot.bases,
            seal_name=snapshot.seal_name,
        )

    async def _choose_base(
        self, snapshot: Snapshot, volume: Volume, revision: Revision
    ) -> tuple[str, tuple[int, ...], dict[str, Revision]]:
        """The base, the generations that it is, segment by segment, and what must still be so when that is kept."""
        index = await self._snapshots.index()
        if earlier := newest_before(snapshot, index.kept, volume.loss_epochs):
            stored = await self._snapshots.stored(earlier.id)
            if stored.record == earlier:
                return earlier.id, earlier.generations, {key_of(earlier.id): stored.revision}
            raise Fenced(f"snapshot {earlier.id} has changed meanwhile: look again")
        origin = index.find(volume.origin)
        if origin and (origin.state is SnapshotState.COMPLETED or volume.source or snapshot.source):
            stored = await self._snapshots.stored(origin.id)
            # A source that is deleted stays in the store only while the volume, or this snapshot, needs it.
            return origin.id, (), {key_of(origin.id): stored.revision, key_of_volume(volume.id): revision}
        if snapshot.source:
            raise NotFound(f"snapshot {snapshot.source}, of which {snapshot.id} is a change, is gone")
        return "", (), {}

    async def _needed(self) -> frozenset[str]:
        """The snapshots whose roots must stay, deleted or not: for volumes that come from them, ships, and readers."""
        # First: what a volume that is hydrated by now had needed is left to snapshots that are entered by then.
        volumes = await self._catalog.volumes()
        present, users = {volume.id for volume in volumes}, users_by_source(volumes)
        unfinished = [each for each in await self._snapshots.unfinished() if phase_of(each) is not Phase.DELETING]
        bases = (each.parent for each in unfinished if phase_of(each) is Phase.SHIPPING and each.started)
        # Of one whose volume is gone nothing can be shipped or read any more.
        sources = (each.source for each in unfinished if each.volume in present)
        shipped = (snapshot for said in self._presence.shipped_now() for snapshot in said)
        # Last: whoever opens one is in this list before he looks whether it is being deleted.
        return frozenset((*bases, *sources, *shipped, *users, *self._presence.read_now()))


def users_by_source(volumes: Iterable[Volume]) -> Mapping[SnapshotId, list[VolumeId]]:
    """Of each snapshot the volumes that come from it and are not hydrated; none of one that is not here."""
    users: dict[SnapshotId, list[VolumeId]] = {}
    for volume in volumes:
        if volume.source:
            users.setdefault(volume.source.snapshot, []).append(volume.id)
    return users


def next_of_each_volume(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Of each volume the one that is being shipped, or else the one with the oldest content."""
    chosen: dict[VolumeId, Snapshot] = {}
    for each in snapshots:
        if phase_of(each) is Phase.SHIPPING:
            now = chosen.get(each.volume)
            if now is None or (not each.started, each.generation) < (not now.started, now.generation):
                chosen[each.volume] = each
    return list(chosen.values())


def newest_before(
    snapshot: Snapshot, snapshots: Iterable[Snapshot], loss_epochs: Collection[Epoch] = ()
) -> Snapshot | None:
    """The completed one of the same volume with the newest content before it, whose generation is still kept.

    Not one from before a loss was accepted: its seal may have been given up, and its generation's number given anew.
    """
    earlier = (
        each
        for each in snapshots
        if each.volume == snapshot.volume
        and each.state is SnapshotState.COMPLETED
        and each.pinned
        and each.generation < snapshot.generation
        and not any(each.seal_epoch < accepted <= snapshot.seal_epoch for accepted in loss_epochs)
    )
    return max(earlier, key=lambda each: each.generation, default=None)
