"""The reconcile loop when the metastore fails under it, and what stays in memory only."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.control.catalog import Catalog
from blockstore.control.creating import Creating
from blockstore.control.floors import Floors
from blockstore.control.hydration import Hydrations
from blockstore.control.metastore.embedded import open_embedded
from blockstore.control.metastore.interface import Metastore
from blockstore.control.peers import Peers
from blockstore.control.placing import Placing
from blockstore.control.presence import Presence
from blockstore.control.reconcile import Reconciler
from blockstore.control.records import Node, Segment, Volume
from blockstore.control.repair_limits import repair_limits
from blockstore.control.snapshot_catalog import SnapshotCatalog
from blockstore.control.transitions import delete
from blockstore.domain import (
    Configuration,
    Member,
    NodeId,
    Position,
    ReplicaId,
    SegmentNumber,
    VolumeId,
    VolumeState,
)
from blockstore.errors import CairnError, NoSpace
from blockstore.rpc.replica_pb2 import ReplicaStatus
from blockstore.units import GIB, MIB, Epoch, Sequence
from tests.control_beating import LIMIT_S
from tests.control_cluster import settings_for, until

NODE = NodeId("node-00000000000000001")
REPLICA = ReplicaId("rep-00000000000000001")
VOLUME = Volume(
    VolumeId("vol-00000000000000001"),
    "v",
    GIB,
    VolumeState.AVAILABLE,
    0,
    (Segment(SegmentNumber(0), GIB, Configuration(1, (Member(REPLICA, NODE),))),),
    Epoch(3),
)


class FailingStore:
    """A metastore whose calls named in `fails` raise."""

    def __init__(self, store: Metastore) -> None:
        self._store = store
        self.fails: dict[str, CairnError] = {}

    def __getattr__(self, name: str) -> Any:
        if name in self.fails:
            raise self.fails[name]
        return getattr(self._store, name)


class Parts:
    """Control without its service."""

    def __init__(self, directory: Path) -> None:
        settings = settings_for(directory)
        self.store = FailingStore(open_embedded(directory, 16 * MIB))
        self.catalog = Catalog(self.store)
        self.presence = Presence(3.0, asyncio.get_running_loop().time, lambda: 7)
        self.floors = Floors(self.catalog)
        peers, placing = Peers(settings), Placing(self.catalog, self.presence, settings.placement)
        limits = repair_limits(self.catalog, settings)
        self.reconciler = Reconciler(
            self.store,
            self.catalog,
            self.presence,
            self.floors,
            peers,
            creating=Creating(self.catalog, self.presence, peers, placing, limits),
            hydrations=Hydrations(SnapshotCatalog(self.store), self.presence),
            interval_s=0.02,
        )

    async def enter(self) -> None:
        """One node, one volume on it."""
        await self.catalog.put_node(Node(NODE, "127.0.0.1:1", "a", GIB))
        assert await self.catalog.add_volume(VOLUME, await self.catalog.nodes())


def run(directory: Path, scenario: Callable[[Parts], Any]) -> None:
    async def all_of_it() -> None:
        parts = Parts(directory)
        try:
            await asyncio.wait_for(scenario(parts), LIMIT_S)
        finally:
            parts.store.fails.clear()
            await parts.store.close()

    asyncio.run(all_of_it())


def test_a_broken_metastore_ends_the_loop_with_its_error(tmp_path: Path) -> None:
    async def scenario(parts: Parts) -> None:
        running = asyncio.ensure_future(parts.reconciler.run())
        parts.store.fails["list"] = CairnError("the disk is gone")
        with pytest.raises(CairnError, match="the disk is gone"):
            await running

    run(tmp_path, scenario)


def test_a_full_disk_does_not_end_it_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario(parts: Parts) -> None:
        await parts.enter()
        parts.floors.learn(VOLUME, REPLICA, Position(Epoch(3), Sequence(50)))
        parts.store.fails["transact"] = NoSpace("no room")
        with pytest.raises(NoSpace):
            await parts.reconciler.reconcile()
        running = asyncio.ensure_future(parts.reconciler.run())
        done, _ = await asyncio.wait([running], timeout=0.1)  # Several passes.
        assert not done
        parts.store.fails.clear()

        async def is_kept() -> bool:
            return bool(await parts.catalog.known_positions())

        await until(is_kept, "the position is kept once there is room")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run(tmp_path, scenario)


def test_positions_never_fall_and_nonsense_is_not_believed(tmp_path: Path) -> None:
    async def scenario(parts: Parts) -> None:
        await parts.enter()
        floors = parts.floors
        low, high = Position(Epoch(2), Sequence(90)), Position(Epoch(3), Sequence(10))
        floors.learn(VOLUME, REPLICA, high)
        floors.learn(VOLUME, REPLICA, low)
        floors.learn(VOLUME, REPLICA, Position(Epoch(4), Sequence(1)))  # No such epoch was given out.
        floors.learn(VOLUME, ReplicaId("rep-0000000000000000f"), high)
        await floors.save()
        again = Floors(parts.catalog)
        await again.load()
        assert again.of(VOLUME.id, REPLICA) == high
        assert again.of(VOLUME.id, ReplicaId("rep-0000000000000000f")) == Position(Epoch(0), Sequence(0))
        deleting = await parts.catalog.change_volume(VOLUME.id, delete)
        await parts.catalog.remove_volume(deleting, ())
        floors.learn(VOLUME, REPLICA, Position(Epoch(3), Sequence(11)))
        await floors.save()
        assert await parts.catalog.known_positions() == ()
        assert floors.of(VOLUME.id, REPLICA) == Position(Epoch(0), Sequence(0))

    run(tmp_path, scenario)


def test_a_node_cannot_be_removed_under_a_volume_that_is_being_entered(tmp_path: Path) -> None:
    """Both orders of the two transactions: the later one fails or sees the earlier one."""

    async def scenario(parts: Parts) -> None:
        await parts.catalog.put_node(Node(NODE, "127.0.0.1:1", "a", GIB))
        seen = await parts.catalog.nodes()
        await parts.catalog.remove_node(NODE)
        assert not await parts.catalog.add_volume(VOLUME, seen)
        assert await parts.catalog.volumes() == ()
        await parts.enter()
        with pytest.raises(CairnError, match="holds replicas"):
            await parts.catalog.remove_node(NODE)

    run(tmp_path, scenario)


def test_a_lease_ends_when_nothing_is_heard_and_begins_with_the_next_word() -> None:
    async def scenario() -> None:
        now = 100.0
        presence = Presence(3.0, lambda: now, lambda: 7)
        assert not presence.is_up(NODE)
        assert presence.settling_s() == 3.0
        presence.node_registered(NODE, GIB)
        now = 103.0
        assert (presence.is_up(NODE), presence.settling_s()) == (True, 0.0)
        now = 103.1
        assert not presence.is_up(NODE)
        presence.node_reported(NODE, GIB, 1, False, {REPLICA: ReplicaStatus()})
        assert presence.is_up(NODE)
        now = 104.0
        presence.node_reported(NODE, GIB, 2, False, {})
        earlier = presence.node_before(NODE, 104.0)
        assert earlier is not None
        assert earlier.used_bytes == 1
        assert presence.node_before(NODE, 103.0) is None

    asyncio.run(scenario())
