"""Snapshots as control gives them to daemons: in order, again where one failed, completed once; and who is a daemon."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import AlreadyExists, Conflict, Fenced, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, snapshot_pb2
from tests.control_beating import LIMIT_S
from tests.control_cluster import Cluster, Control, until
from tests.control_snapshots import COMPLETED, PENDING, in_state, pins_of, run, task_of
from tests.control_store import root_of

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE

# ---- given to daemons


def test_one_after_the_other_each_as_a_change_of_the_one_before(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        daemon.ships = False
        volume = await control.create(name="v")
        await control.attach("v")
        made = [(await control.snapshot("v"))[0] for _ in range(3)]
        first = await task_of(daemon, made[0].id)
        assert (first.base, first.base_root, first.base_generation) == ("", b"", 0)
        assert {each.address for each in first.segments[0].configuration.members} == {
            each.endpoint.address for each in cluster.nodes
        }
        assert set(daemon.tasks) == {made[0].id}
        waiting = (await control.get_snapshot(made[1].id)).progress.why
        assert made[0].id in waiting
        daemon.ships = True
        for each in made:
            await in_state(control, each.id, COMPLETED)
        assert [task.snapshot.id for task in daemon.shipped] == [each.id for each in made]
        assert [task.base for task in daemon.shipped] == ["", made[0].id, made[1].id]
        assert [task.base_root for task in daemon.shipped[1:]] == [root_of(each.id) for each in made[:2]]
        assert [task.base_generation for task in daemon.shipped] == [0, 1, 2]
        assert [(await control.get_snapshot(each.id)).parent for each in made] == ["", made[0].id, made[1].id]
        await pins_of(cluster, volume.id, {(3, made[2].id)})

    run(tmp_path, scenario)


def test_the_pin_of_a_detached_volume_is_taken_away_under_maintenance(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume, front_end = await control.create(name="v"), cluster.front_ends[0]
        front_end.fails["UnpinGeneration"] = QuorumUnavailable("busy")
        made = [(await control.snapshot("v"))[0] for _ in range(2)]
        await in_state(control, made[1].id, COMPLETED)

        async def was_tried() -> bool:
            return ("UnpinGeneration", volume.id) in front_end.calls

        await until(was_tried, "it was tried")
        assert len(cluster.layers[volume.id].pins) == 2
        front_end.fails.clear()
        await pins_of(cluster, volume.id, {(2, made[1].id)})

        async def is_closed() -> bool:
            return not front_end.volumes and (await control.get("v")).state == AVAILABLE

        await until(is_closed, "it is closed again")

    run(tmp_path, scenario)


def test_what_fails_says_why_and_is_shipped_by_a_retry(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        daemon.ships = False
        volume = await control.create(name="v")
        first, second = [(await control.snapshot("v"))[0] for _ in range(2)]
        await task_of(daemon, first.id)
        fail = snapshot_pb2.FailSnapshotRequest(
            daemon=daemon.id, instance=daemon.instance, snapshot=first.id, reason="the bucket is full"
        )
        await control.call("FailSnapshot", fail)
        assert (await control.get_snapshot(first.id)).reason == "the bucket is full"
        # The next one does not wait for it, and it keeps its generation for a retry.
        assert (await task_of(daemon, second.id)).base == ""
        assert (1, first.id) in cluster.layers[volume.id].pins
        await control.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=first.id))
        daemon.ships = True
        for each in (first, second):
            completed = await in_state(control, each.id, COMPLETED)
            assert completed.reason == ""
        await pins_of(cluster, volume.id, {(2, second.id)})

    run(tmp_path, scenario)


def test_two_daemons_share_the_work_and_one_takes_over_what_the_other_had(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        one, other = cluster.daemons
        one.ships = other.ships = False
        for name in ("a", "b", "c", "d"):
            await control.create(name=name)
            await control.snapshot(name)

        async def are_shared() -> bool:
            return len(one.tasks) == len(other.tasks) == 2 and not one.tasks.keys() & other.tasks.keys()

        await until(are_shared, "each has two")
        lost = next(iter(one.tasks.values()))
        await one.fall_silent()

        async def are_taken_over() -> bool:
            return len(other.tasks) == 4

        await until(are_taken_over, "the other has all of them")
        with pytest.raises(Fenced, match=other.id), cairn_errors():  # Back from the dead.
            await one.ship(control.stub, lost)
        other.ships = True
        await in_state(control, lost.snapshot.id, COMPLETED)

    run(tmp_path, scenario, daemons=2, lease_s=1.5)


def test_a_heartbeat_stands_until_there_is_news_or_its_time_is_up(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        await control.create(name="a")
        await daemon.fall_silent()

        def beat(wait_s: float, *known: str) -> Any:
            request = snapshot_pb2.DaemonHeartbeatRequest(
                daemon=daemon.id, instance=daemon.instance, address=daemon.endpoint.address, wait_s=wait_s, known=known
            )
            return asyncio.ensure_future(control.stub.DaemonHeartbeat(request, timeout=LIMIT_S))

        began = asyncio.get_running_loop().time()
        assert not (await beat(0.2)).ship
        assert asyncio.get_running_loop().time() - began >= 0.2
        standing = beat(LIMIT_S)
        (snapshot,) = await control.snapshot("a")
        assert [task.snapshot.id for task in (await standing).ship] == [snapshot.id]
        # It is given still; who has not heard of it is answered at once, however often it asks.
        assert [task.snapshot.id for task in (await beat(LIMIT_S)).ship] == [snapshot.id]
        standing = beat(LIMIT_S, snapshot.id)
        await daemon.ship(control.stub, snapshot_pb2.ShipTask(snapshot=snapshot))
        assert not (await standing).ship

    run(tmp_path, scenario, lease_s=3 * LIMIT_S)


# ---- completing


def test_completing_is_idempotent_and_fails_when_prune_has_moved(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        daemon.ships = False
        await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        task = await task_of(daemon, snapshot.id)
        raised = await control.call(
            "RaisePruneNumber", snapshot_pb2.RaisePruneNumberRequest(daemon=daemon.id, expected=0)
        )
        assert raised.prune_number == 1
        with pytest.raises(Fenced, match="prune number is 1"), cairn_errors():
            await daemon.ship(control.stub, task, prune_number=0)
        assert (await control.get_snapshot(snapshot.id)).state == PENDING
        with pytest.raises(Fenced, match="not 0"):
            await control.call("RaisePruneNumber", snapshot_pb2.RaisePruneNumberRequest(daemon=daemon.id, expected=0))
        completed = await daemon.ship(control.stub, task, prune_number=1)
        assert completed.state == COMPLETED
        await control.call("RaisePruneNumber", snapshot_pb2.RaisePruneNumberRequest(daemon=daemon.id, expected=1))
        assert await daemon.ship(control.stub, task, prune_number=1) == completed
        other = snapshot_pb2.CompleteSnapshotRequest(
            daemon=daemon.id, instance=daemon.instance, snapshot=snapshot.id, root=bytes(32), prune_number=2
        )
        with pytest.raises(AlreadyExists, match="root"):
            await control.call("CompleteSnapshot", other)
        other.root = b"short"
        with pytest.raises(InvalidRequest, match="5 bytes"):
            await control.call("CompleteSnapshot", other)
        other.instance = "an older one"
        with pytest.raises(Fenced, match="another process"):
            await control.call("CompleteSnapshot", other)

    run(tmp_path, scenario)


def test_what_an_earlier_try_says_of_its_end_is_not_taken_after_a_retry(tmp_path: Path) -> None:
    """Its daemon did not hear of the retry; the old base is deleted, and may be pruned."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        await control.create(name="v")
        (first,) = await control.snapshot("v")
        await in_state(control, first.id, COMPLETED)
        daemon.ships = False
        (second,) = await control.snapshot("v")
        old = await task_of(daemon, second.id)
        assert old.base == first.id
        fail = snapshot_pb2.FailSnapshotRequest(daemon=daemon.id, instance=daemon.instance, snapshot=second.id)
        await control.call("FailSnapshot", fail)
        await control.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=first.id))
        with pytest.raises(Conflict, match="in error"), cairn_errors():
            await daemon.ship(control.stub, old)
        await control.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=second.id))
        with pytest.raises(Fenced, match="was retried since"), cairn_errors():
            await daemon.ship(control.stub, old)
        with pytest.raises(Fenced, match="was retried since"):
            await control.call("FailSnapshot", fail)
        assert (await control.get_snapshot(second.id)).state == PENDING
        daemon.ships = True
        assert (await in_state(control, second.id, COMPLETED)).parent == ""

    run(tmp_path, scenario)


def test_watching_tells_each_change_until_it_is_not_pending_any_more(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        daemon.ships = False
        await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        seen: list[snapshot_pb2.Snapshot] = []

        async def watch() -> None:
            async for each in control.stub.WatchSnapshot(snapshot_pb2.GetSnapshotRequest(snapshot=snapshot.id)):
                seen.append(each)

        watching = asyncio.ensure_future(watch())
        await task_of(daemon, snapshot.id)
        for done in (10, 20):
            daemon.progress[snapshot.id] = snapshot_pb2.ShipProgress(bytes_done=done, bytes_total=20)

            async def is_seen(done: int = done) -> bool:
                return bool(seen) and seen[-1].progress.bytes_done == done

            await until(is_seen, f"{done} bytes are seen")
        daemon.ships = True
        await asyncio.wait_for(watching, LIMIT_S)
        assert (seen[0].state, seen[-1].state) == (PENDING, COMPLETED)
        assert all(before != after for before, after in itertools.pairwise(seen))
        daemon.ships = False
        await control.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot.id))
        await asyncio.wait_for(watch(), LIMIT_S)
        assert seen[-1].state == snapshot_pb2.SNAPSHOT_STATE_DELETING, "told, and not until somebody has dropped it"
        with pytest.raises(NotFound), cairn_errors():
            async for _ in control.stub.WatchSnapshot(snapshot_pb2.GetSnapshotRequest(snapshot="snap-0")):
                pass

    run(tmp_path, scenario)


# ---- daemons


def test_who_has_no_repository_yet_is_told_the_clusters_name_and_no_more(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        request = snapshot_pb2.RegisterDaemonRequest(
            daemon="sd-000000000000000ff", instance="i", address="127.0.0.1:1", store="memory://"
        )
        name = (await control.call("RegisterDaemon", request)).cluster
        assert len(name) == 32
        assert not (await control.call("GetStore", snapshot_pb2.GetStoreRequest())).daemons
        request.repository = "mine"
        assert (await control.call("RegisterDaemon", request)).cluster == name
        (daemon,) = (await control.call("GetStore", snapshot_pb2.GetStoreRequest())).daemons
        assert (daemon.id, daemon.up, daemon.store, daemon.repository) == (request.daemon, True, "memory://", "mine")

    run(tmp_path, scenario, daemons=0)


def test_a_daemon_with_another_repository_is_refused_once_there_is_a_snapshot(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        (daemon,) = cluster.daemons
        request = snapshot_pb2.RegisterDaemonRequest(
            daemon="sd-000000000000000ff", instance="i", address="127.0.0.1:1", store="memory://", repository="new"
        )
        answer = await control.call("RegisterDaemon", request)
        assert answer.cluster == daemon.cluster
        assert len(answer.cluster) == 32
        # While nothing was shipped the last one counts; the other one has to register anew, and does.
        await control.create(name="v")
        (snapshot,) = await control.snapshot("v")
        await in_state(control, snapshot.id, COMPLETED)
        with pytest.raises(Conflict, match="the-repository"):
            await control.call("RegisterDaemon", request)
        request.repository = ""
        with pytest.raises(Conflict, match="no repository in memory://, and this cluster's snapshots are in the-repo"):
            await control.call("RegisterDaemon", request)  # it would make one
        request.address = ""
        assert (await control.call("RegisterDaemon", request)).cluster == daemon.cluster, "it was started, and no more"
        request.daemon = "sd-1"
        with pytest.raises(InvalidRequest):
            await control.call("RegisterDaemon", request)
        unknown = snapshot_pb2.DaemonHeartbeatRequest(daemon="sd-00000000000000009", instance="i")
        with pytest.raises(NotFound):
            await control.call("DaemonHeartbeat", unknown)

    run(tmp_path, scenario)
