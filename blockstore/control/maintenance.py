"""Opening volumes that nobody has attached, for control's own work: a seal, an unpin, repair, hydration.

A front-end gets the volume with an epoch of its own and does not export it; the volume stays
`available`. It ends when no work is left, or when its front-end is down; whatever a user asks for ends
it in the user's own transition, and the next epoch fences it. So nothing waits for it and nothing
depends on its end being said: a front-end that was not told hears it with its next heartbeat.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from blockstore.control import transitions
from blockstore.control.catalog import Catalog
from blockstore.control.hydration import Hydrations
from blockstore.control.maintenance_work import MaintenanceWork, Purpose
from blockstore.control.peers import Peers
from blockstore.control.presence import Presence
from blockstore.control.reconcile import MOVED_ON, Reconciler
from blockstore.control.records import FrontEnd, Maintenance, MaintenanceState, Volume
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.domain import FrontEndId, VolumeId
from blockstore.errors import CairnError, Corrupt, NotFound, QuorumUnavailable

_log = structlog.get_logger(__name__)

#: Detached volumes that one front-end hydrates at once: each takes object store and nodes from the guests.
MAX_HYDRATING: Final = 2
#: Those that one has open because a replica is not good: a node that was lost may leave a thousand of them at once.
MAX_MENDING: Final = 4
#: Before a volume that could not be opened is tried again: each attempt is an epoch, and seals at its nodes. Nobody
#: waits for a replica that is only behind.
RETRY_S: Final = 1.0
CATCH_UP_RETRY_S: Final = 60.0
#: A volume that is open for a replica that is behind, and brings it nothing for so long (its front-end does not reach
#: that node, or its disk is full), gives its place to others, and is tried again much later.
STALLED_S: Final = 60.0
STALLED_RETRY_S: Final = 300.0


#: How many volumes a front-end has open for what takes object store and nodes from the guests.
_MOST: Final = {
    Purpose.HYDRATE: MAX_HYDRATING,
    Purpose.MEND: MAX_MENDING,
    Purpose.CATCH_UP: MAX_MENDING,
}

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
        self._presence = presence
        self._peers = peers
        self._reconciler = reconciler
        self._hydrations = hydrations
        self._work = MaintenanceWork(snapshots, presence, hydrations)
        self._retry_at: dict[tuple[VolumeId, Purpose], float] = {}
        self._progress: dict[VolumeId, tuple[list[tuple[int, int]], float]] = {}
        """Of those that are open for a replica that is behind: how far it was, and since when."""

    async def reconcile(self, roster: Roster) -> None:
        """Begin, go on with, and end what is to be."""
        self._hydrations.keep_only([volume.id for volume in roster.active if volume.source])
        self._forget_all_but(roster.by_id)
        wanted = await self._work.wanted(roster)
        registered = await self._catalog.front_ends()
        instances = {each.id: each.instance for each in registered}
        for volume in roster.active:
            if (held := volume.maintenance) is None:
                continue
            purpose = wanted.get(volume.id)
            if (
                purpose
                and instances.get(held.front_end) == held.instance
                and self._presence.may_be_up(held.front_end)
                and not (purpose is Purpose.CATCH_UP and self._stalls(volume, held))
            ):
                self._go_on(volume, held, purpose)
            else:
                await self._end(volume, held)
        front_ends = [each for each in registered if self._presence.is_up(each.id)]
        loads, copying = _loads(roster.active, wanted)
        for volume_id, purpose in wanted.items():
            volume = roster.by_id[volume_id]
            if volume.maintenance or not self._may_try(volume.id, purpose):
                continue
            if front_end := _choose(front_ends, purpose, loads, copying):
                await self._begin(volume, front_end, purpose)
                loads[front_end.id] += 1
                copying[front_end.id, purpose] += 1
            else:
                self._hydrations.waits(volume.id, "" if front_ends else "no front-end is up")

    def _forget_all_but(self, volumes: Mapping[VolumeId, Volume]) -> None:
        """The others are gone; and how far one was counts while it is open."""
        self._retry_at = {key: at for key, at in self._retry_at.items() if key[0] in volumes}
        self._progress = {
            volume: seen
            for volume, seen in self._progress.items()
            if volume in volumes and volumes[volume].maintenance is not None
        }

    def _may_try(self, volume: VolumeId, purpose: Purpose) -> bool:
        return asyncio.get_running_loop().time() >= self._retry_at.get((volume, purpose), 0.0)

    def _stalls(self, volume: Volume, held: Maintenance) -> bool:
        """Whether it has brought nothing to the replica that is behind for STALLED_S."""
        report, now = self._work.report(volume), asyncio.get_running_loop().time()
        how_far = [(each.matched.sequence, each.extents_done) for each in report.members] if report else []
        before, since = self._progress.get(volume.id, (None, now))
        if how_far != before:
            self._progress[volume.id] = how_far, now
            return False
        if now - since < STALLED_S:
            return False
        why = next((each.degraded_why for each in report.members if each.degraded_why), "") if report else ""
        error = QuorumUnavailable(
            f"front-end {held.front_end} brought nothing for {STALLED_S:.0f} s{': ' + why if why else ''}"
        )
        self._reconciler.steps.tell(subject_of(volume.id), error)
        self._retry_at[volume.id, Purpose.CATCH_UP] = now + STALLED_RETRY_S
        return True

    # ---- one volume

    async def _begin(self, volume: Volume, front_end: FrontEnd, purpose: Purpose) -> None:
        try:
            begun = await self._catalog.change_volume(volume.id, lambda now: transitions.maintain(now, front_end))
        except MOVED_ON:
            return  # A user was first.
        _log.info("volume opens for maintenance", volume=volume.id, front_end=front_end.id, purpose=purpose.value)
        assert begun.maintenance is not None
        self._start_opening(begun, begun.maintenance, purpose)

    def _go_on(self, volume: Volume, held: Maintenance, purpose: Purpose) -> None:
        if held.state is MaintenanceState.OPENING and self._presence.is_up(held.front_end):
            self._start_opening(volume, held, purpose)

    def _start_opening(self, volume: Volume, held: Maintenance, purpose: Purpose) -> None:
        key = (volume.id, "maintenance", held.epoch)
        self._reconciler.steps.start(key, subject_of(volume.id), lambda: self._open(volume, held, purpose))

    async def _open(self, volume: Volume, held: Maintenance, purpose: Purpose) -> None:
        front_end = await self._catalog.front_end(held.front_end)
        try:
            if front_end.instance != held.instance:
                raise QuorumUnavailable(f"front-end {front_end.id} started anew before it had opened {volume.id}")
            await self._peers.open_volume(front_end, (await self._reconciler.messages()).ticket(volume))
        except CairnError as error:
            if not await self._is_held(volume.id, held):
                return  # A user was first, and that is how it ended.
            await self._not_opened(volume.id, held, purpose, error)
            raise
        self._retry_at.pop((volume.id, purpose), None)
        self._hydrations.waits(volume.id, "")
        await self._reconciler.end_attempt(volume.id, lambda now: transitions.maintained(now, held.epoch))

    async def _is_held(self, volume: VolumeId, held: Maintenance) -> bool:
        """Whether it still is to be open for that."""
        try:
            now = (await self._catalog.volume(volume)).maintenance
        except NotFound:
            return False
        return now is not None and now.epoch == held.epoch

    async def _not_opened(self, volume: VolumeId, held: Maintenance, purpose: Purpose, error: CairnError) -> None:
        pause_s = CATCH_UP_RETRY_S if purpose is Purpose.CATCH_UP else RETRY_S
        self._retry_at[volume, purpose] = asyncio.get_running_loop().time() + pause_s
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
                f"end of the {subject_of(volume.id)}",  # what stood in the way of that stays known
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
        if (purpose := wanted.get(volume.id)) in (Purpose.MEND, Purpose.CATCH_UP):
            copying[volume.maintenance.front_end, purpose] += 1
    return loads, copying


def _choose(
    front_ends: Iterable[FrontEnd], purpose: Purpose, loads: "Counter[FrontEndId]", copying: Copying
) -> FrontEnd | None:
    """The one with the fewest volumes; for what copies much only one that has room for it."""
    most = _MOST.get(purpose)
    free = [each for each in front_ends if most is None or copying[each.id, purpose] < most]
    return min(free, key=lambda each: (loads[each.id], each.id), default=None)
