"""Snapshots that front-ends read: what they are told, and that nothing of it goes while they read."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, Fenced, InvalidRequest, NotFound
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, MemoryFrontEnd, cluster_at, until
from tests.control_snapshots import DELETING, completed, gone, pins_of, run, task_of
from tests.control_store import root_of
from tests.patient_time import run_patiently

#: Of control; a front-end that is silent for so long reads nothing any more.
LEASE_S = 1.0


def request_of(front_end: MemoryFrontEnd, snapshot: str, *, again: bool = False) -> snapshot_pb2.OpenSnapshotRequest:
    return snapshot_pb2.OpenSnapshotRequest(
        snapshot=snapshot, front_end=front_end.id, instance=front_end.instance, again=again
    )


async def opened(cluster: Cluster, control: Control, snapshot: str) -> snapshot_pb2.OpenSnapshotResponse:
    found: snapshot_pb2.OpenSnapshotResponse = await control.call(
        "OpenSnapshot", request_of(cluster.front_ends[0], snapshot)
    )
    return found


async def is_kept(cluster: Cluster, control: Control, snapshot: str) -> None:
    """For longer than a lease: what was opened later goes meanwhile, and after that what nobody has opened."""
    later, unread = await completed(control, "later"), await completed(control, "unread")
    await opened(cluster, control, later)
    for other in (later, unread):
        await delete(control, other)
        await gone(control, other)
    assert (await control.get_snapshot(snapshot)).state == DELETING


async def on_the_nodes(cluster: Cluster, control: Control, name: str) -> tuple[str, str]:
    """A new volume and its snapshot, which the daemon does not ship."""
    daemon, front_end = cluster.daemons[0], cluster.front_ends[0]
    daemon.ships = False
    volume = await control.create(GIB, name=name)
    await control.attach(name)
    front_end.write(volume.id)
    (snapshot,) = await control.snapshot(name)
    await task_of(daemon, snapshot.id)
    return volume.id, snapshot.id


async def delete(control: Control, snapshot: str) -> None:
    await control.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot))


def test_a_completed_one_is_kept_until_its_last_reader_says_so_no_more(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, front_end = await completed(control), cluster.front_ends[0]
        found = await opened(cluster, control, snapshot)
        assert (found.source.snapshot, found.source.root, found.source.size_bytes) == (snapshot, root_of(snapshot), GIB)
        assert list(found.source.addresses) == [cluster.daemons[0].endpoint.address]
        assert not found.segments
        front_end.reading = {snapshot}
        await delete(control, snapshot)
        await is_kept(cluster, control, snapshot)
        with pytest.raises(Conflict, match="deleting"):
            await opened(cluster, control, snapshot)
        again = await control.call("OpenSnapshot", request_of(front_end, snapshot, again=True))
        assert again.source.root == root_of(snapshot)
        front_end.reading = set()
        await gone(control, snapshot)
        with pytest.raises(NotFound):
            await control.call("OpenSnapshot", request_of(front_end, snapshot, again=True))

    run(tmp_path, scenario, lease_s=LEASE_S)


def test_opening_it_keeps_it_before_the_first_heartbeat_says_so(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        await opened(cluster, control, snapshot)
        await delete(control, snapshot)
        assert (await control.get_snapshot(snapshot)).state == DELETING
        await gone(control, snapshot)  # a lease later, and by itself

    run(tmp_path, scenario, lease_s=LEASE_S)


def test_a_new_control_deletes_nothing_before_all_have_been_heard(tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with cluster_at(tmp_path, daemons=1) as cluster:
            front_end = cluster.front_ends[0]
            async with cluster.control(lease_s=LEASE_S) as control:
                snapshot = await completed(control)
                front_end.reading = {snapshot}
                await opened(cluster, control, snapshot)
                await delete(control, snapshot)
            async with cluster.control(lease_s=LEASE_S) as control:
                await is_kept(cluster, control, snapshot)
                front_end.reading = set()
                await gone(control, snapshot)

    run_patiently(all_of_it())


def test_one_on_the_nodes_is_told_with_its_generation_which_stays_pinned_while_it_is_read(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        front_end = cluster.front_ends[0]
        volume, snapshot = await on_the_nodes(cluster, control, "v")
        found = await opened(cluster, control, snapshot)
        assert (list(found.generations), len(found.segments), found.HasField("source")) == ([1], 1, False)
        assert [each.address for each in found.segments[0].configuration.members]
        front_end.reading = {snapshot}
        await delete(control, snapshot)
        later, unread = await on_the_nodes(cluster, control, "later"), await on_the_nodes(cluster, control, "unread")
        await opened(cluster, control, later[1])
        for other, its_snapshot in (later, unread):
            await delete(control, its_snapshot)
            await pins_of(cluster, other, set())
        assert cluster.layers[volume].pins == {(1, snapshot)}
        front_end.reading = set()
        await pins_of(cluster, volume, set())

    run(tmp_path, scenario, lease_s=LEASE_S)


def test_its_uris_are_those_of_front_ends_that_show_snapshots(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)

        async def is_shown() -> bool:
            return list((await control.get_snapshot(snapshot)).uris) == [f"nbd://127.0.0.1:10809/{snapshot}"]

        await until(is_shown, "the front-end has said that it shows snapshots")
        cluster.front_ends[0].shows_snapshots = False

        async def is_shown_no_more() -> bool:
            return not (await control.get_snapshot(snapshot)).uris

        await until(is_shown_no_more, "the front-end shows no snapshots any more")

    run(tmp_path, scenario)


def test_who_may_not_ask_is_refused(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, front_end = await completed(control), cluster.front_ends[0]
        for asked, error in (
            (request_of(front_end, "snap-x"), InvalidRequest),
            (request_of(front_end, "snap-" + "0" * 17), NotFound),
            (snapshot_pb2.OpenSnapshotRequest(snapshot=snapshot, front_end=front_end.id, instance="old"), Fenced),
            (snapshot_pb2.OpenSnapshotRequest(snapshot=snapshot, front_end="fe-" + "0" * 17), NotFound),
        ):
            with pytest.raises(error):
                await control.call("OpenSnapshot", asked)
        beat = control_pb2.FrontEndHeartbeatRequest(
            front_end=front_end.id, instance=front_end.instance, address="127.0.0.1:1", reading=["../x"]
        )
        with pytest.raises(InvalidRequest):
            await control.call("FrontEndHeartbeat", beat)

    run(tmp_path, scenario)
