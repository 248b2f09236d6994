"""What volumes that nobody has attached need a front-end for, by what the catalog and the last heartbeats say.

Invariants: nothing is named here that opening the volume could not do, or begin; and what is named goes away once it is
done, so that the volume is let go of again. Of several purposes one is named, the one that waits the least.
"""

import asyncio
from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

from blockstore.control.catalog import tombstones_of
from blockstore.control.hydration import Hydrations
from blockstore.control.lag import behind, heard, shorter
from blockstore.control.membership import is_changing
from blockstore.control.presence import Presence
from blockstore.control.records import Volume
from blockstore.control.roster import Roster
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.snapshot_records import Snapshot
from blockstore.control.snapshot_transitions import Phase as SnapshotPhase
from blockstore.control.snapshot_transitions import phase_of as snapshot_phase_of
from blockstore.control.transitions import Phase, phase_of, place_of
from blockstore.control.unfit import are_alike, can_be_mended, can_catch_up
from blockstore.domain import ReplicaId, VolumeId
from blockstore.rpc.control_pb2 import VolumeReport
from blockstore.rpc.replica_pb2 import ReplicaStatus

#: A volume that was just detached is often attached again at once, and that does the same.
BEHIND_FOR_S: Final = 5.0


class Purpose(Enum):
    """What a volume is opened for."""

    SEAL = "a snapshot to be sealed"
    SETTLE = "a seal that its replicas do not know as committed"
    UNPIN = "a generation to be given up"
    HYDRATE = "hydration"
    MEMBERS = "a change of members"
    MEND = "a replica that is not whole, or damaged"
    CATCH_UP = "a replica that is behind the others"


class _Asked(NamedTuple):
    """The volumes that snapshots ask something of."""

    sealing: set[VolumeId]
    shipping: dict[VolumeId, list[Snapshot]]
    unpinning: set[VolumeId]


class MaintenanceWork:
    """See the module. It remembers since when members are behind, and which volumes needed nothing."""

    def __init__(self, snapshots: SnapshotCatalog, presence: Presence, hydrations: Hydrations) -> None:
        self._snapshots = snapshots
        self._presence = presence
        self._hydrations = hydrations
        self._behind_since: dict[VolumeId, float] = {}
        self._words: list[Mapping[ReplicaId, ReplicaStatus]] = []
        self._at_rest: dict[VolumeId, Volume] = {}
        """By these words nothing has to be done about them, unless a snapshot asks for it; as their records are."""

    async def wanted(self, roster: Roster) -> dict[VolumeId, Purpose]:
        """The work on volumes that nobody has attached."""
        asked, served = await self._asked_for(), await self._hydrations.may_be_served()
        asking = asked.sealing | asked.shipping.keys() | asked.unpinning
        here = self._presence.replicas_up()
        self._hear([*here.values()])
        before, self._behind_since = self._behind_since, {}
        found = {}
        for volume in roster.volumes:
            if self._at_rest.get(volume.id) is volume and volume.id not in asking:
                continue
            if phase_of(volume) is not Phase.AVAILABLE:
                continue
            # What its front-end says of one that is open counts as well.
            is_well = volume.maintenance is None and are_alike(volume, here)
            statuses = {} if is_well else heard(here, volume)
            if purpose := self._for_snapshots(volume, asked):
                found[volume.id] = purpose
            elif any(map(is_changing, volume.segments)):
                found[volume.id] = Purpose.MEMBERS
            elif not is_well and can_be_mended(volume, statuses):
                found[volume.id] = Purpose.MEND
            elif volume.source and not volume.source.paused and served:
                found[volume.id] = Purpose.HYDRATE
            elif not is_well and self._has_lagged(volume, statuses, before):
                found[volume.id] = Purpose.CATCH_UP
            elif is_well and not volume.source:
                self._at_rest[volume.id] = volume
        return found

    async def _asked_for(self) -> _Asked:
        asked = _Asked(set(), {}, {each.volume for each in await self._snapshots.pins()})
        for each in await self._snapshots.unfinished():
            if snapshot_phase_of(each) is SnapshotPhase.SEALING:
                asked.sealing.add(each.volume)
            elif snapshot_phase_of(each) is SnapshotPhase.SHIPPING:
                asked.shipping.setdefault(each.volume, []).append(each)
        return asked

    def _for_snapshots(self, volume: Volume, asked: _Asked) -> Purpose | None:
        if volume.id in asked.sealing:
            return Purpose.SEAL
        if not all(self._is_readable(volume, each) for each in asked.shipping.get(volume.id, ())):
            return Purpose.SETTLE
        return Purpose.UNPIN if volume.id in asked.unpinning else None

    def _hear(self, words: list[Mapping[ReplicaId, ReplicaStatus]]) -> None:
        """What was found by other words counts no more. Between two heartbeats there are many passes."""
        if len(words) != len(self._words) or any(now is not then for now, then in zip(words, self._words, strict=True)):
            self._words, self._at_rest = words, {}

    def report(self, volume: Volume) -> VolumeReport | None:
        """What the front-end that has it open says of it."""
        place = place_of(volume)
        word = self._presence.front_end(place.front_end) if place else None
        report = word.volumes.get(volume.id) if word else None
        return report if place and report and report.epoch == place.epoch else None

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

    def _has_lagged(
        self, volume: Volume, statuses: dict[ReplicaId, ReplicaStatus], before: Mapping[VolumeId, float]
    ) -> bool:
        """Whether one has been behind for long enough. before: since when each was, as of the last pass."""
        if not self._lags(volume, statuses, was_behind=volume.id in before):
            return False
        now = asyncio.get_running_loop().time()
        since = self._behind_since[volume.id] = before.get(volume.id, now)
        return volume.maintenance is not None or now - since >= BEHIND_FOR_S

    def _lags(self, volume: Volume, statuses: dict[ReplicaId, ReplicaStatus], *, was_behind: bool) -> bool:
        """A member is behind by the words of the nodes; or, once it is open, by that of its front-end.

        Who opens a volume appends a record to its log: what the nodes said before is not the end of it.
        """
        report = self.report(volume)
        if report and any(each.connected and each.lag_records for each in report.members):
            return True
        found = behind(self._presence, volume, statuses)
        if was_behind:
            found |= shorter(volume, statuses)  # a word that is late takes nothing back
        return can_catch_up(volume, statuses, found)
