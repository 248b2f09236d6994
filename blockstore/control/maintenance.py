"""Opening volumes that nobody has attached, for control's own work: a seal, an unpin, repair, hydration.

A front-end gets the volume with an epoch of its own and does not export it; the volume stays
`available`. It ends when no work is left, or when its front-end is down; whatever a user asks for ends
it in the user's own transition, and the next epoch fences it. So nothing waits for it and nothing
depends on its end being said: a front-end that was not told hears it with its next heartbeat.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

import structlog

from blockstore.control import transitions
from blockstore.control.catalog import Catalog, tombstones_of
from blockstore.control.hydration import Hydrations
from blockstore.control.membership import is_changing
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.records import FrontEnd, Maintenance, MaintenanceState, Volume
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_records import Snapshot
from blockstore.control.snapshot_transitions import Phase as SnapshotPhase
from blockstore.control.snapshot_transitions import phase_of as snapshot_phase_of
from blockstore.control.transitions import Phase, phase_of
from blockstore.control.unfit import needs_front_end
from blockstore.domain import FrontEndId, ReplicaId, VolumeId
from blockstore.errors import CairnError, Corrupt, NotFound, QuorumUnavailable
from blockstore.rpc.replica_pb2 import ReplicaStatus

_log = structlog.get_logger(__name__)

#: Detached volumes that one front-end hydrates at once: each takes object store and nodes from the guests.
MAX_HYDRATING: Final = 2
#: Those that one has open because a replica is not good: a node that was lost may leave a thousand of them at once.
MAX_MENDING: Final = 4
#: Before a volume that could not be opened is tried again: each attempt is an epoch, and seals at its nodes.
RETRY_S: Final = 1.0


class Purpose(Enum):
    """What a volume is opened for."""

    SEAL = "a snapshot to be sealed"
    SETTLE = "a seal that its replicas do not know as committed"
    UNPIN = "a generation to be given up"
    HYDRATE = "hydration"
    MEMBERS = "a change of members"
    MEND = "a replica that is not whole, or damaged"


#: How many volumes a front-end has open for what takes object store and nodes from the guests.
_MOST: Final = {Purpose.HYDRATE: MAX_HYDRATING, Purpose.MEND: MAX_MENDING}

Copying = Counter[tuple[FrontEndId, Purpose]]
"""Detached volumes that are open, by front-end and purpose."""


class Upkeep:
    """Which volumes are open for maintenance, and where."""

    def __init__(
        self,
        catalog: Catalog,
        snapshots: SnapshotCatalog,
        presence: Presence,
        peers: Peers,
        reconciler: Reconciler,
        *,
        hydrations: Hydrations,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler
        self._hydrations = hydrations
        self._retry_at: dict[VolumeId, float] = {}

    async def reconcile(self, volumes: tuple[Volume, ...]) -> None:
        """Begin, go on with, and end what is to be."""
        self._hydrations.keep_only([volume.id for volume in volumes if volume.source])
        for gone in self._retry_at.keys() - {volume.id for volume in volumes}:
            del self._retry_at[gone]
        wanted = await self._wanted(volumes)
        registered = await self._catalog.front_ends()
        instances = {each.id: each.instance for each in registered}
        for volume in volumes:
            if (held := volume.maintenance) is None:
                continue
            if (
                volume.id in wanted
                and instances.get(held.front_end) == held.instance
                and self._presence.may_be_up(held.front_end)
            ):
                self._go_on(volume, held)
            else:
                await self._end(volume, held)
        front_ends = [each for each in registered if self._presence.is_up(each.id)]
        loads, copying = _loads(volumes, wanted)
        for volume in volumes:
            purpose = wanted.get(volume.id)
            if purpose is None or volume.maintenance or not self._may_try(volume.id):
                continue
            if front_end := _choose(front_ends, purpose, loads, copying):
                await self._begin(volume, front_end, purpose)
                loads[front_end.id] += 1
                copying[front_end.id, purpose] += 1
            else:
                self._hydrations.waits(volume.id, "" if front_ends else "no front-end is up")

    async def _wanted(self, volumes: Iterable[Volume]) -> dict[VolumeId, Purpose]:
        """The work on volumes that nobody has attached."""
        unfinished = await self._snapshots.unfinished()
        sealing = {each.volume for each in unfinished if snapshot_phase_of(each) is SnapshotPhase.SEALING}
        shipping: dict[VolumeId, list[Snapshot]] = {}
        for each in unfinished:
            if snapshot_phase_of(each) is SnapshotPhase.SHIPPING:
                shipping.setdefault(each.volume, []).append(each)
        unpinning = {each.volume for each in await self._snapshots.pins()}
        served = await self._hydrations.may_be_served()
        found = {}
        for volume in volumes:
            if phase_of(volume) is not Phase.AVAILABLE:
                continue
            if volume.id in sealing:
                found[volume.id] = Purpose.SEAL
            elif not all(self._is_readable(volume, each) for each in shipping.get(volume.id, ())):
                found[volume.id] = Purpose.SETTLE
            elif volume.id in unpinning:
                found[volume.id] = Purpose.UNPIN
            elif any(map(is_changing, volume.segments)):
                found[volume.id] = Purpose.MEMBERS
            elif needs_front_end(volume, self._statuses(volume)):
                found[volume.id] = Purpose.MEND
            elif volume.source and not volume.source.paused and served:
                found[volume.id] = Purpose.HYDRATE
        return found

    def _statuses(self, volume: Volume) -> dict[ReplicaId, ReplicaStatus]:
        """What nodes that are up say of its replicas."""
        found = {}
        for each in tombstones_of(volume):
            word = self._presence.node(each.node)
            if word and word.replicas and each.replica in word.replicas and self._presence.is_up(each.node):
                found[each.replica] = word.replicas[each.replica]
        return found

    def _is_readable(self, volume: Volume, snapshot: Snapshot) -> bool:
        """A whole replica of each segment knows that its seal is committed, and so has its generation, or will soon.

        A front-end tells it with what it sends next; one that let go of the volume too early never does.
        """
        known = set()
        for each in tombstones_of(volume):
            word = self._presence.node(each.node)
            status = word.replicas.get(each.replica) if word and word.replicas else None
            if status and status.whole and each.segment < len(snapshot.seals):
                seal = snapshot.seals[each.segment]
                if (status.commit.epoch, status.commit.sequence) >= (seal.epoch, seal.sequence):
                    known.add(each.segment)
        return len(known) == len(snapshot.seals)

    def _may_try(self, volume: VolumeId) -> bool:
        return asyncio.get_running_loop().time() >= self._retry_at.get(volume, 0.0)

    # ---- one volume

    async def _begin(self, volume: Volume, front_end: FrontEnd, purpose: Purpose) -> None:
        try:
            begun = await self._catalog.change_volume(volume.id, lambda now: transitions.maintain(now, front_end))
        except MOVED_ON:
            return  # A user was first.
        _log.info("volume opens for maintenance", volume=volume.id, front_end=front_end.id, purpose=purpose.value)
        assert begun.maintenance is not None
        self._start_opening(begun, begun.maintenance)

    def _go_on(self, volume: Volume, held: Maintenance) -> None:
        if held.state is MaintenanceState.OPENING and self._presence.is_up(held.front_end):
            self._start_opening(volume, held)

    def _start_opening(self, volume: Volume, held: Maintenance) -> None:
        key = (volume.id, "maintenance", held.epoch)
        self._reconciler.steps.start(key, subject_of(volume.id), lambda: self._open(volume, held))

    async def _open(self, volume: Volume, held: Maintenance) -> None:
        front_end = await self._catalog.front_end(held.front_end)
        try:
            if front_end.instance != held.instance:
                raise QuorumUnavailable(f"front-end {front_end.id} started anew before it had opened {volume.id}")
            await self._peers.open_volume(front_end, (await self._reconciler.messages()).ticket(volume))
        except CairnError as error:
            if not await self._is_held(volume.id, held):
                return  # A user was first, and that is how it ended.
            await self._not_opened(volume.id, held, error)
            raise
        self._retry_at.pop(volume.id, None)
        self._hydrations.waits(volume.id, "")
        await self._reconciler.end_attempt(volume.id, lambda now: transitions.maintained(now, held.epoch))

    async def _is_held(self, volume: VolumeId, held: Maintenance) -> bool:
        """Whether it still is to be open for that."""
        try:
            now = (await self._catalog.volume(volume)).maintenance
        except NotFound:
            return False
        return now is not None and now.epoch == held.epoch

    async def _not_opened(self, volume: VolumeId, held: Maintenance, error: CairnError) -> None:
        self._retry_at[volume] = asyncio.get_running_loop().time() + RETRY_S
        self._hydrations.waits(volume, f"it cannot be opened: {error}")
        if isinstance(error, Corrupt):
            await self._reconciler.end_attempt(volume, lambda now: transitions.lost(now, held.epoch, str(error)))
        else:
            await self._reconciler.end_attempt(volume, lambda now: transitions.end_maintenance(now, held.epoch))
        await self._reconciler.close_quietly(held.front_end, volume, held.epoch)

    async def _end(self, volume: Volume, held: Maintenance) -> None:
        try:
            await self._catalog.change_volume(volume.id, lambda now: transitions.end_maintenance(now, held.epoch))
        except MOVED_ON:
            return  # A user's request ended it.
        _log.info("maintenance of a volume ends", volume=volume.id, front_end=held.front_end)
        if self._presence.is_up(held.front_end):
            self._reconciler.steps.start(
                (volume.id, "close", held.epoch),
                subject_of(volume.id),
                lambda: self._reconciler.close_quietly(held.front_end, volume.id, held.epoch),
            )


def subject_of(volume: VolumeId) -> str:
    """Whose trouble it is that a volume cannot be opened for maintenance."""
    return f"maintenance of {volume}"


def _loads(volumes: Iterable[Volume], wanted: Mapping[VolumeId, Purpose]) -> tuple["Counter[FrontEndId]", Copying]:
    """How many volumes each front-end has, and how many detached ones it has open for what."""
    loads: Counter[FrontEndId] = Counter()
    copying: Copying = Counter()
    for volume in volumes:
        if held := volume.attachment or volume.maintenance:
            loads[held.front_end] += 1
        if not volume.maintenance:
            continue
        if volume.source and not volume.source.paused:  # whatever it was opened for
            copying[volume.maintenance.front_end, Purpose.HYDRATE] += 1
        if wanted.get(volume.id) is Purpose.MEND:
            copying[volume.maintenance.front_end, Purpose.MEND] += 1
    return loads, copying


def _choose(
    front_ends: Iterable[FrontEnd], purpose: Purpose, loads: "Counter[FrontEndId]", copying: Copying
) -> FrontEnd | None:
    """The one with the fewest volumes; for what copies much only one that has room for it."""
    most = _MOST.get(purpose)
    free = [each for each in front_ends if most is None or copying[each.id, purpose] < most]
    return min(free, key=lambda each: (loads[each.id], each.id), default=None)
