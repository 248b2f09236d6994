"""Snapshots as control makes, gives out, completes and deletes them, with front-ends and daemons over real gRPC."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import (
    AlreadyExists,
    Conflict,
    Corrupt,
    Fenced,
    InvalidRequest,
    NotFound,
    QuorumUnavailable,
)
from blockstore.grpc_errors import cairn_errors
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.rpc.replica_pb2 import Position
from blockstore.units import GIB
from tests.control_beating import LIMIT_S
from tests.control_cluster import Cluster, Control, cluster_at, until
from tests.control_store import STATISTICS, MemoryDaemon, root_of

PENDING = snapshot_pb2.SNAPSHOT_STATE_PENDING
COMPLETED = snapshot_pb2.SNAPSHOT_STATE_COMPLETED
ERROR = snapshot_pb2.SNAPSHOT_STATE_ERROR
DELETING = snapshot_pb2.SNAPSHOT_STATE_DELETING
AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE

Scenario = Callable[[Cluster, Control], Awaitable[None]]


def run(directory: Path, scenario: Scenario, *, front_ends: int = 1, daemons: int = 1, **settings: Any) -> None:
    async def all_of_it() -> None:
        async with (
            cluster_at(directory, 3, front_ends, daemons) as cluster,
            cluster.control(**settings) as control,
        ):
            await scenario(cluster, control)

    asyncio.run(all_of_it())


async def in_state(control: Control, snapshot: str, state: int) -> snapshot_pb2.Snapshot:
    """The snapshot as soon as it is in that state."""

    async def is_so() -> snapshot_pb2.Snapshot | None:
        found = await control.get_snapshot(snapshot)
        return found if found.state == state else None

    found: snapshot_pb2.Snapshot = await until(is_so, f"{snapshot} is in state {state}")
    return found


async def gone(control: Control, snapshot: str) -> None:
    async def is_gone() -> bool:
        return snapshot not in {each.id for each in await control.snapshots()}

    await until(is_gone, f"{snapshot} is gone")


async def task_of(daemon: MemoryDaemon, snapshot: str) -> snapshot_pb2.ShipTask:
    async def is_given() -> snapshot_pb2.ShipTask | None:
        return daemon.tasks.get(snapshot)

    task: snapshot_pb2.ShipTask = await until(is_given, f"{snapshot} is given to {daemon.id}")
    return task


async def pins_of(cluster: Cluster, volume: str, expected: set[tuple[int, str]]) -> None:
    """Waits until the volume's replicas keep exactly these."""

    async def are_so() -> bool:
        return cluster.layers[volume].pins == expected

    await until(are_so, f"the pins are {expected}, not {cluster.layers[volume].pins}")


# ---- creating


def test_an_attached_volume_is_sealed_where_it_is_served(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(3 * GIB, name="data")
        await control.attach("data")
        cluster.front_ends[0].write(volume.id)
        (snapshot,) = await control.snapshot("data", description="nightly", tags={"k": "v"})
        assert snapshot.id.startswith("snap-")
        assert (snapshot.state, snapshot.volume, snapshot.volume_name) == (PENDING, volume.id, "data")
        assert (snapshot.size_bytes, snapshot.generation, snapshot.pause_us) == (3 * GIB, 1, 250)
        assert (snapshot.description, dict(snapshot.tags), snapshot.barrier) == ("nightly", {"k": "v"}, "")
        assert snapshot.sealed_at_ms >= snapshot.created_at_ms > 1_600_000_000_000
        assert cluster.layers[volume.id].sealed == {snapshot.id: (1, 1)}
        completed = await in_state(control, snapshot.id, COMPLETED)
        assert (completed.root, completed.statistics) == (root_of(snapshot.id), STATISTICS)
        assert completed.completed_at_ms >= completed.sealed_at_ms
        assert (await control.get("data")).epoch == 1

    run(tmp_path, scenario)


def test_a_detached_volume_is_opened_for_maintenance_and_stays_available(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        volume = await control.create(name="v")
        seen: list[tuple[int, control_pb2.OpenTicket]] = []
        front_end.hooks["SealVolume"] = lambda request: seen.append(
            (request.epoch, front_end.volumes[volume.id].ticket)
        )
        (snapshot,) = await control.snapshot("v")
        ((epoch, ticket),) = seen
        assert (epoch, ticket.maintenance, ticket.name) == (1, True, "v")
        assert (snapshot.state, snapshot.generation) == (PENDING, 1)

        async def is_closed() -> bool:
            now = await control.get("v")
            return now.state == AVAILABLE and not now.HasField("attachment") and not front_end.volumes

        await until(is_closed, "it is closed again")
        assert (await control.attach("v")).epoch == 2

    run(tmp_path, scenario)


def test_the_same_token_gives_the_same_snapshots(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.create(name="w")
        made = await asyncio.gather(*(control.snapshot("v", client_token="t") for _ in range(5)))
        assert len({each[0].id for each in made}) == 1
        assert len(cluster.layers[volume.id].sealed) == 1
        with pytest.raises(Conflict, match="used for other snapshots"):
            await control.snapshot("w", client_token="t")
        await control.delete_snapshot(made[0][0].id)
        await gone(control, made[0][0].id)
        (again,) = await control.snapshot("v", client_token="t")
        assert again.id != made[0][0].id

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("volumes", "fields", "error", "message"),
    [
        ((), {}, InvalidRequest, "0 volumes"),
        (("v", "v"), {}, InvalidRequest, "named twice"),
        (tuple(str(number) for number in range(33)), {}, InvalidRequest, "33 volumes"),
        (("v",), {"description": "d" * 1025}, InvalidRequest, "description"),
        (("v",), {"client_token": "t" * 65}, InvalidRequest, "token"),
        (("v",), {"tags": {"": "x"}}, InvalidRequest, "tag ''"),
        (("none",), {}, NotFound, "no volume"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    tmp_path: Path, volumes: tuple[str, ...], fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        with pytest.raises(error, match=message):
            await control.snapshot(*volumes, **fields)
        assert await control.snapshots() == []

    run(tmp_path, scenario)


def test_a_volume_in_error_has_no_snapshot_and_says_what_to_do(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        cluster.front_ends[0].outcome = Corrupt("records are missing")
        with pytest.raises(Corrupt):
            await control.attach("v")
        with pytest.raises(Conflict, match="--accept-loss"):
            await control.snapshot("v")

    run(tmp_path, scenario)


def test_without_a_front_end_it_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.create(name="w")
        await control.attach("w")
        await cluster.front_ends[0].stop()

        async def is_down() -> bool:
            return not (await control.status()).front_ends[0].up

        await until(is_down, "its lease ends")
        with pytest.raises(QuorumUnavailable, match="no front-end is up"):
            await control.snapshot("v")
        with pytest.raises(QuorumUnavailable, match="--force"):
            await control.snapshot("w")
        assert await control.snapshots() == []

    run(tmp_path, scenario, lease_s=1.5)


@pytest.mark.parametrize("where", ["fails", "then_fails"])
def test_a_seal_whose_answer_is_lost_is_asked_for_again_and_made_once(tmp_path: Path, where: str) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume, front_end = await control.create(name="v"), cluster.front_ends[0]
        await control.attach("v")
        getattr(front_end, where)["SealVolume"] = QuorumUnavailable("one member answers")
        creating = asyncio.ensure_future(control.snapshot("v"))

        async def says_why() -> bool:
            return any("one member answers" in each.progress.why for each in await control.snapshots())

        await until(says_why, "the reason is shown")
        getattr(front_end, where).clear()
        (snapshot,) = await creating
        assert (snapshot.state, snapshot.generation) == (PENDING, 1)
        assert len(front_end.calls) > 1
        assert len(cluster.layers[volume.id].sealed) == 1

    run(tmp_path, scenario)


def test_what_can_never_be_sealed_is_in_error_and_keeps_no_pin(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume, front_end = await control.create(name="v"), cluster.front_ends[0]
        await control.attach("v")
        front_end.then_fails["SealVolume"] = Conflict("too many generations")
        (snapshot,) = await control.snapshot("v")
        assert (snapshot.state, snapshot.sealed_at_ms) == (ERROR, 0)
        assert "too many generations" in snapshot.reason
        front_end.then_fails.clear()
        await pins_of(cluster, volume.id, set())
        with pytest.raises(Conflict, match="never sealed"):
            await control.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=snapshot.id))
        await control.delete_snapshot(snapshot.id)
        await gone(control, snapshot.id)

    run(tmp_path, scenario, daemons=0)


def test_what_is_not_sealed_in_time_is_in_error_and_keeps_no_pin(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume, front_end = await control.create(name="v"), cluster.front_ends[0]
        await control.attach("v")
        front_end.then_fails["SealVolume"] = QuorumUnavailable("one member answers")
        (snapshot,) = await control.snapshot("v")
        assert snapshot.state == ERROR
        assert "within 1 s" in snapshot.reason
        assert "one member answers" in snapshot.reason
        front_end.then_fails.clear()
        await pins_of(cluster, volume.id, set())

    run(tmp_path, scenario, daemons=0, seal_limit_s=1.0)


def test_a_snapshot_waits_for_an_attach_that_is_under_way(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        front_end = cluster.front_ends[0]
        front_end.may_open.clear()
        attaching = asyncio.ensure_future(control.attach("v"))
        await front_end.opening.wait()
        creating = asyncio.ensure_future(control.snapshot("v"))

        async def is_entered() -> bool:
            return bool(await control.snapshots())

        await until(is_entered, "it is entered")
        with pytest.raises(Conflict, match="until it is sealed"):
            await control.delete_snapshot((await control.snapshots())[0].id)
        assert not creating.done()
        front_end.may_open.set()
        attached = await attaching
        (snapshot,) = await creating
        assert (snapshot.state, attached.epoch) == (PENDING, 1)

    run(tmp_path, scenario)


def test_a_volume_stays_open_until_a_replica_knows_that_the_seal_is_committed(tmp_path: Path) -> None:
    """Else nobody could read the generation: replicas hear of a commit from the front-end only."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        volume, front_end = await control.create(name="v"), cluster.front_ends[0]
        cluster.daemons[0].ships = False
        front_end.position = Position(epoch=1, sequence=7)
        (snapshot,) = await control.snapshot("v")
        assert snapshot.state == PENDING
        await task_of(cluster.daemons[0], snapshot.id)
        await control.attach("v")
        await control.detach("v")  # A user's detach is no end of it either.

        async def is_open() -> bool:
            return volume.id in front_end.volumes and front_end.volumes[volume.id].ticket.maintenance

        await until(is_open, "it is open for maintenance")
        (status,) = cluster.nodes[0].replicas.values()
        status.commit.CopyFrom(Position(epoch=1, sequence=7))

        async def is_closed() -> bool:
            return not front_end.volumes

        await until(is_closed, "it is closed")

    run(tmp_path, scenario)


# ---- shipping


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


# ---- completing, and prune


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


# ---- watching, listing


def test_watching_tells_each_change_until_it_is_completed(tmp_path: Path) -> None:
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
        await asyncio.wait_for(watching, 30)
        assert (seen[0].state, seen[-1].state) == (PENDING, COMPLETED)
        assert all(before != after for before, after in itertools.pairwise(seen))
        with pytest.raises(NotFound), cairn_errors():
            async for _ in control.stub.WatchSnapshot(snapshot_pb2.GetSnapshotRequest(snapshot="snap-0")):
                pass

    run(tmp_path, scenario)


def test_snapshots_are_listed_by_volume_also_when_that_is_gone(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.create(name="w")
        (of_v,), (of_w,) = await control.snapshot("v"), await control.snapshot("w")
        assert {each.id for each in await control.snapshots()} == {of_v.id, of_w.id}
        assert [each.id for each in await control.snapshots("v")] == [of_v.id]
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

    run(tmp_path, scenario)


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
        request.daemon = "sd-1"
        with pytest.raises(InvalidRequest):
            await control.call("RegisterDaemon", request)
        unknown = snapshot_pb2.DaemonHeartbeatRequest(daemon="sd-00000000000000009", instance="i")
        with pytest.raises(NotFound):
            await control.call("DaemonHeartbeat", unknown)

    run(tmp_path, scenario)
