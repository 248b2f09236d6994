"""Snapshots as control makes them: sealed once, where the volume is served or under maintenance, or in error."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockstore.control.reconcile import Reconciler
from blockstore.errors import Conflict, Corrupt, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.rpc.replica_pb2 import Position
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, until
from tests.control_scenario import until_down
from tests.control_snapshots import COMPLETED, ERROR, PENDING, gone, in_state, pins_of, run, task_of
from tests.control_store import STATISTICS, root_of

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE


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


def test_attached_volumes_are_sealed_without_waiting_for_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass looks at everything else as well."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        for name in ("v", "w"):
            await control.create(name=name)
            await control.attach(name)

        async def never(_: Reconciler) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(Reconciler, "reconcile", never)
        (alone,) = await control.snapshot("v")
        together = await control.snapshot("v", "w")
        assert [each.generation for each in (alone, *together)] == [1, 2, 1]

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
        await until_down(control, cluster.front_ends[0].id)
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
