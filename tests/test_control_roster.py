"""Which volumes a pass passes over: those at rest, and never one about which something is to be done."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockstore.control import maintenance_work, unfit
from blockstore.control.codec import encode
from blockstore.control.hydration import Hydrations
from blockstore.control.maintenance_work import MaintenanceWork, Purpose
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.presence import Presence
from blockstore.control.records import Growing, Maintenance, MaintenanceState, Segment, Source, Volume
from blockstore.control.roster import Roster, is_at_rest
from blockstore.control.snapshot_catalog import PINS, SnapshotCatalog
from blockstore.control.snapshot_records import Pin, StoreDaemon
from blockstore.domain import (
    Configuration,
    DaemonId,
    FrontEndId,
    Member,
    NodeId,
    Replacement,
    ReplicaId,
    SegmentNumber,
    SnapshotId,
    VolumeId,
    VolumeState,
)
from blockstore.rpc.replica_pb2 import Position, ReplicaStatus
from blockstore.units import GIB, Epoch

MEMBERS = tuple(Member(ReplicaId(f"rep-{each}"), NodeId(f"node-{each}")) for each in "abc")
NEWCOMER = Member(ReplicaId("rep-d"), NodeId("node-d"))


def volume(configuration: Configuration) -> Volume:
    segments = (Segment(SegmentNumber(0), GIB, configuration),)
    return Volume(VolumeId("vol-a"), "", GIB, VolumeState.AVAILABLE, 0, segments)


RESTING = volume(Configuration(1, MEMBERS))


@pytest.mark.parametrize(
    "active",
    [
        *(replace(RESTING, state=state) for state in VolumeState if state is not VolumeState.AVAILABLE),
        replace(RESTING, maintenance=Maintenance(FrontEndId("fe-a"), "instance", Epoch(1), MaintenanceState.OPENING)),
        replace(RESTING, source=Source(SnapshotId("snap-a"), "00", GIB)),
        replace(RESTING, source=Source(SnapshotId("snap-a"), "00", GIB, paused=True)),
        replace(RESTING, growing=Growing(2 * GIB, 2 * GIB, ())),
        replace(RESTING, reason="the last attach failed"),
        volume(Configuration(2, MEMBERS[1:], old_members=MEMBERS)),
        volume(Configuration(1, MEMBERS, replacement=Replacement(NEWCOMER, MEMBERS[0].replica))),
    ],
)
def test_whatever_a_record_says_that_goes_on_makes_a_volume_active(active: Volume) -> None:
    assert is_at_rest(RESTING)
    assert not is_at_rest(active)
    roster = Roster((RESTING, active))
    assert roster.active == (active,)
    assert roster.volumes == (RESTING, active)


class Upkeep:
    """What volumes are opened for, by what three nodes say. looked_at: whose replicas were compared.

    now: what the leases go by, in seconds.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = open_embedded(directory)
        self.snapshots = SnapshotCatalog(self.store)
        self.now = 0.0
        self.presence = Presence(60.0, lambda: self.now, lambda: 7)
        self.work = MaintenanceWork(self.snapshots, self.presence, Hydrations(self.snapshots, self.presence))
        self.looked_at: list[str] = []
        compare = unfit.are_alike

        def counted(volume: Volume, here: Mapping[Any, Any]) -> bool:
            self.looked_at.append(volume.id)
            return compare(volume, here)

        monkeypatch.setattr(maintenance_work, "are_alike", counted)

    def hear(self, **not_whole: bool) -> None:
        """All three nodes, each with its replica; those named are being filled."""
        for member in MEMBERS:
            status = ReplicaStatus(
                whole=not not_whole.get(member.node.removeprefix("node-"), False), end=Position(epoch=1, sequence=5)
            )
            self.presence.node_reported(member.node, GIB, 0, False, {member.replica: status})

    async def look(self, *volumes: Volume) -> dict[VolumeId, Purpose]:
        self.looked_at.clear()
        return await self.work.wanted(Roster(volumes))


def run(directory: Path, monkeypatch: pytest.MonkeyPatch, scenario: Callable[[Upkeep], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        upkeep = Upkeep(directory, monkeypatch)
        try:
            upkeep.hear()
            await scenario(upkeep)
        finally:
            await upkeep.store.close()

    asyncio.run(all_of_it())


def test_a_volume_that_needs_nothing_is_looked_at_anew_when_somebody_says_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(upkeep: Upkeep) -> None:
        assert await upkeep.look(RESTING) == {}
        assert upkeep.looked_at == [RESTING.id]
        assert await upkeep.look(RESTING) == {}
        assert upkeep.looked_at == [], "nothing was said since"

        renamed = replace(RESTING, name="other")
        assert await upkeep.look(renamed) == {}
        assert upkeep.looked_at == [RESTING.id], "its record is another"

        pin = Pin(RESTING.id, SnapshotId("snap-a"), 1)
        await upkeep.store.transact({}, {f"{PINS}{pin.volume}/{pin.snapshot}": encode(pin)})
        assert await upkeep.look(renamed) == {RESTING.id: Purpose.UNPIN}, "a snapshot asks for it"

        upkeep.hear(a=True)
        assert await upkeep.look(renamed) == {RESTING.id: Purpose.UNPIN}
        await upkeep.snapshots.remove_pin(pin)
        assert await upkeep.look(renamed) == {RESTING.id: Purpose.MEND}
        assert await upkeep.look(renamed) == {RESTING.id: Purpose.MEND}, "until it is done"
        upkeep.hear()
        assert await upkeep.look(renamed) == {}

    run(tmp_path, monkeypatch, scenario)


def test_a_node_that_goes_away_or_comes_back_is_a_reason_to_look_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(upkeep: Upkeep) -> None:
        await upkeep.look(RESTING)
        upkeep.now = 61.0  # every lease is over
        await upkeep.look(RESTING)
        assert upkeep.looked_at == [RESTING.id]
        upkeep.hear(c=True)
        assert await upkeep.look(RESTING) == {RESTING.id: Purpose.MEND}

    run(tmp_path, monkeypatch, scenario)


def test_a_volume_that_waits_for_a_daemon_is_opened_once_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(upkeep: Upkeep) -> None:
        restored = replace(RESTING, source=Source(SnapshotId("snap-a"), "00", GIB))
        assert await upkeep.look(restored) == {}
        daemon = StoreDaemon(DaemonId("sd-a"), "instance", "127.0.0.1:1", "", "")
        await upkeep.snapshots.put_daemon(daemon)
        upkeep.presence.daemon_registered(daemon.id)
        assert await upkeep.look(restored) == {RESTING.id: Purpose.HYDRATE}

    run(tmp_path, monkeypatch, scenario)
