"""Snapshots that control knows of: what prune must keep, what is found and listed, and how one is deleted."""

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from blockstore.control.codec import encode
from blockstore.control.metastore.embedded import EmbeddedMetastore, open_embedded
from blockstore.control.metastore.interface import Revision
from blockstore.control.snapshot_catalog import SNAPSHOTS, SnapshotCatalog
from blockstore.control.snapshot_records import Snapshot, SnapshotState
from blockstore.domain import SnapshotId, VolumeId
from blockstore.errors import AlreadyExists, Conflict, Corrupt, Fenced, InvalidRequest, NotFound
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import snapshot_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, until
from tests.control_snapshots import COMPLETED, DELETING, gone, in_state, pins_of, run, task_of
from tests.control_store import MemoryDaemon, root_of

# ---- known


def test_the_roots_are_all_that_prune_must_keep(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        await control.create(name="v")
        await control.create(name="w")
        (whole,) = await control.snapshot("v")
        await in_state(control, whole.id, COMPLETED)
        daemon.ships = False
        (pending,) = await control.snapshot("w")
        roots = await control.call("GetRoots", snapshot_pb2.GetRootsRequest())
        assert [(each.snapshot, each.root) for each in roots.roots] == [(whole.id, root_of(whole.id))]
        assert (list(roots.pending), roots.prune_number) == ([pending.id], 0)
        await control.delete_snapshot(whole.id)  # Kept until its root object is gone.
        assert len((await control.call("GetRoots", snapshot_pb2.GetRootsRequest())).roots) == 1
        daemon.ships = True
        await gone(control, whole.id)
        await in_state(control, pending.id, COMPLETED)
        roots = await control.call("GetRoots", snapshot_pb2.GetRootsRequest())
        assert [each.snapshot for each in roots.roots] == [pending.id]

    run(tmp_path, scenario)


def test_a_snapshot_found_in_the_store_becomes_known(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        found = snapshot_pb2.Snapshot(
            id="snap-00000000000000001", size_bytes=GIB, description="imported", root=bytes(32), created_at_ms=5
        )
        request = snapshot_pb2.AddSnapshotRequest(snapshot=found, prune_number=0)
        added = await control.call("AddSnapshot", request)
        assert (added.state, added.size_bytes, added.volume, added.created_at_ms) == (COMPLETED, GIB, "", 5)
        assert await control.call("AddSnapshot", request) == added
        request.snapshot.root = b"1" * 32
        with pytest.raises(AlreadyExists, match="root"):
            await control.call("AddSnapshot", request)
        request.snapshot.id, request.prune_number = "snap-00000000000000002", 3
        with pytest.raises(Fenced, match="prune number is 0"):
            await control.call("AddSnapshot", request)
        request.snapshot.id = "snap-2"
        with pytest.raises(InvalidRequest):
            await control.call("AddSnapshot", request)

    run(tmp_path, scenario)


def test_snapshots_are_listed_by_volume_also_when_that_is_gone(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.create(name="w")
        (of_v,), (of_w,) = await control.snapshot("v"), await control.snapshot("w")
        assert {each.id for each in await control.snapshots()} == {of_v.id, of_w.id}
        assert [each.id for each in await control.snapshots("v")] == [of_v.id]
        for limit, newest in ((1, [of_w.id]), (2, [of_v.id, of_w.id]), (3, [of_v.id, of_w.id])):
            asked = snapshot_pb2.ListSnapshotsRequest(limit=limit)
            assert [each.id for each in (await control.call("ListSnapshots", asked)).snapshots] == newest
        await in_state(control, of_v.id, COMPLETED)
        await control.delete("v")
        assert [each.id for each in await control.snapshots(volume.id)] == [of_v.id]
        with pytest.raises(NotFound):
            await control.snapshots("v")

    run(tmp_path, scenario)


# ---- deleting


def test_a_volume_cannot_go_before_its_snapshots_are_whole(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        daemon.ships = False
        await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        with pytest.raises(Conflict, match="wait until it is completed"):
            await control.delete("v")
        daemon.ships = True
        await in_state(control, snapshot.id, COMPLETED)
        assert (await control.delete("v")).deleted
        assert (await control.get_snapshot(snapshot.id)).state == COMPLETED

    run(tmp_path, scenario)


def test_deleting_gives_the_pin_up_drops_the_root_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        volume = await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        await in_state(control, snapshot.id, COMPLETED)
        assert (await control.delete_snapshot(snapshot.id)).state == DELETING
        await gone(control, snapshot.id)
        assert daemon.dropped == [snapshot.id]
        assert daemon.roots == set()
        await pins_of(cluster, volume.id, set())

        async def is_empty() -> bool:
            left = [each for prefix in ("snapshots/", "pins/") for each in (await control.store.list(prefix)).items]
            return not left

        await until(is_empty, "nothing is left of it")
        drop = snapshot_pb2.DropSnapshotRequest(daemon=daemon.id, snapshot=snapshot.id)
        await control.call("DropSnapshot", drop)  # Said twice.

        other = "snap-00000000000000001"
        asked = snapshot_pb2.FindDeletedRequest(snapshots=[other, snapshot.id])
        assert list((await control.call("FindDeleted", asked)).snapshots) == [snapshot.id]
        late = snapshot_pb2.Snapshot(id=snapshot.id, size_bytes=GIB, root=bytes(32), created_at_ms=5)
        with pytest.raises(Conflict, match="deleted"):
            await control.call("AddSnapshot", snapshot_pb2.AddSnapshotRequest(snapshot=late))
        for wrong in (["snap-2"], [other] * 10_001):
            with pytest.raises(InvalidRequest):
                await control.call("FindDeleted", snapshot_pb2.FindDeletedRequest(snapshots=wrong))

    run(tmp_path, scenario)


def test_two_of_one_token_that_go_at_once_leave_nothing(tmp_path: Path) -> None:
    class Together(EmbeddedMetastore):
        """Both have looked before either changes anything."""

        looked = 0
        both = asyncio.Event()

        async def transact(self, conditions: Any, puts: Any = None, deletes: Any = ()) -> Revision | None:
            if deletes:
                self.looked += 1
                if self.looked == 2:
                    self.both.set()
                await self.both.wait()
            return await super().transact(conditions, puts, deletes)

    async def scenario() -> None:
        with patch("blockstore.control.metastore.embedded.EmbeddedMetastore", Together):
            store = open_embedded(tmp_path)
        catalog = SnapshotCatalog(store)
        entered = [
            Snapshot(SnapshotId(f"snap-{name}"), VolumeId("vol-a"), "", 0, SnapshotState.DELETING, 0, client_token="t")
            for name in ("a", "b")
        ]
        try:
            assert await catalog.enter(entered, ())
            await asyncio.gather(*(catalog.remove(each.id) for each in entered))
            assert not (await store.list("snapshot")).items
        finally:
            await store.close()

    asyncio.run(scenario())


def test_a_record_that_cannot_be_read_hides_no_other_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = open_embedded(tmp_path)
        catalog = SnapshotCatalog(store)
        try:
            for earlier in (0, 1):  # of all records, and of one step
                assert len((await catalog.index()).all) == earlier
                snapshot = Snapshot(SnapshotId(f"snap-{earlier}"), VolumeId("vol-a"), "", 0, SnapshotState.DELETING, 0)
                bad = SNAPSHOTS + "snap-bad"
                assert await store.transact({}, {bad: b"{}", SNAPSHOTS + snapshot.id: encode(snapshot)})
                for _ in range(2):
                    with pytest.raises(Corrupt):
                        await catalog.index()
                assert await store.transact({}, {}, [bad])
                assert len((await catalog.index()).all) == earlier + 1
        finally:
            await store.close()

    asyncio.run(scenario())


def test_one_that_no_daemon_ever_had_goes_without_one(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        assert "snapshotd" in (await control.get_snapshot(snapshot.id)).progress.why
        await control.delete_snapshot(snapshot.id)
        await gone(control, snapshot.id)
        await pins_of(cluster, volume.id, set())

    run(tmp_path, scenario, daemons=0)


def test_what_is_deleted_while_it_is_shipped_is_dropped_when_its_daemon_has_let_go(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        shipping, dropping = cluster.daemons
        shipping.ships = dropping.ships = False
        await control.create(name="v")
        (snapshot,) = await control.snapshot("v")

        async def is_shipped() -> MemoryDaemon | None:
            return next((each for each in cluster.daemons if snapshot.id in each.tasks), None)

        shipping = await until(is_shipped, "one of them has it")
        (dropping,) = (each for each in cluster.daemons if each is not shipping)
        task = shipping.tasks[snapshot.id]
        await shipping.fall_silent()
        shipping_still = snapshot_pb2.DaemonHeartbeatRequest(
            daemon=shipping.id, instance=shipping.instance, address=shipping.endpoint.address
        )
        shipping_still.snapshots.add(snapshot=snapshot.id)
        await control.delete_snapshot(snapshot.id)
        answer = await control.call("DaemonHeartbeat", shipping_still)
        assert (list(answer.ship), list(answer.drop)) == ([], [])  # It hears that it is to stop.
        with pytest.raises(Conflict, match="must stay"), cairn_errors():
            await dropping.drop(control.stub, snapshot.id)
        with pytest.raises(Conflict, match="being deleted"), cairn_errors():
            await shipping.ship(control.stub, task)
        del shipping_still.snapshots[:]
        assert list((await control.call("DaemonHeartbeat", shipping_still)).drop) == [snapshot.id]
        dropping.ships = True
        await gone(control, snapshot.id)

    run(tmp_path, scenario, daemons=2)


def test_a_base_stays_in_the_store_while_something_is_shipped_as_a_change_of_it(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        await control.create(name="v")
        (base,) = await control.snapshot("v")
        await in_state(control, base.id, COMPLETED)
        daemon.ships = False
        (snapshot,) = await control.snapshot("v")
        assert (await task_of(daemon, snapshot.id)).base == base.id
        await control.delete_snapshot(base.id)
        beat = snapshot_pb2.DaemonHeartbeatRequest(
            daemon=daemon.id, instance=daemon.instance, address=daemon.endpoint.address
        )
        answer = await control.call("DaemonHeartbeat", beat)
        assert (list(answer.drop), [each.base for each in answer.ship]) == ([], [base.id])
        daemon.ships = True
        await gone(control, base.id)
        assert (await control.get_snapshot(snapshot.id)).state == COMPLETED

    run(tmp_path, scenario)
