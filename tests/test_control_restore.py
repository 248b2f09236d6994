"""Volumes made from snapshots: what they are told, how they get hydrated, and what keeps their source."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from blockstore.control.maintenance import MAX_HYDRATING
from blockstore.errors import Conflict, Corrupt, Fenced, InvalidRequest, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import GIB, MIB
from tests.control_cluster import Cluster, Control, until
from tests.control_snapshots import COMPLETED, DELETING, completed, gone, in_state, run, task_of
from tests.control_store import root_of

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE
IN_USE = control_pb2.VOLUME_STATE_IN_USE


async def set_hydration(control: Control, volume: str, **fields: Any) -> control_pb2.Volume:
    changed: control_pb2.Volume = await control.call(
        "SetHydration", snapshot_pb2.SetHydrationRequest(volume=volume, **fields)
    )
    return changed


async def hydrated(control: Control, volume: str) -> control_pb2.Volume:
    async def is_so() -> control_pb2.Volume | None:
        found = await control.get(volume)
        return None if found.HasField("source") else found

    found: control_pb2.Volume = await until(is_so, f"{volume} is hydrated")
    return found


def maintained(cluster: Cluster) -> list[str]:
    """The volumes that front-ends have for control's own work."""
    return [name for each in cluster.front_ends for name, opened in each.volumes.items() if opened.ticket.maintenance]


# ---- creating


def test_a_volume_is_made_from_a_snapshot_and_is_available_at_once(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        volume = await control.create(0, name="r", snapshot=snapshot, init_rate_bytes=5 * MIB)
        assert (volume.state, volume.size_bytes) == (AVAILABLE, GIB)
        assert volume.source == control_pb2.Source(
            snapshot=snapshot,
            root=root_of(snapshot),
            size_bytes=GIB,
            addresses=[cluster.daemons[0].endpoint.address],
        )
        assert (volume.hydration.rate_bytes, volume.hydration.paused) == (5 * MIB, False)
        members = [each.replica for each in volume.segments[0].configuration.members]
        sources = {replica: source for node in cluster.nodes for replica, source in node.sources.items()}
        assert [sources[each] for each in members] == [snapshot.encode()] * 3
        assert list((await control.get_snapshot(snapshot)).used_by) == [volume.id]
        larger = await control.create(2 * GIB, snapshot=snapshot)
        assert (larger.size_bytes, larger.source.size_bytes) == (2 * GIB, GIB)

    run(tmp_path, scenario)


def test_the_same_token_gives_the_same_restored_volume(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        made = await asyncio.gather(*(control.create(0, snapshot=snapshot, client_token="t") for _ in range(3)))
        assert len({each.id for each in made}) == 1
        with pytest.raises(Conflict, match="used for another volume"):
            await control.create(GIB, client_token="t")

    run(tmp_path, scenario)


def test_what_cannot_be_restored_says_why(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        with pytest.raises(InvalidRequest, match="smaller than snapshot"):
            await control.create(GIB - 4096, snapshot=snapshot)
        with pytest.raises(InvalidRequest, match="no snapshot to copy from"):
            await control.create(GIB, init_rate_bytes=5)
        with pytest.raises(NotFound, match="no snapshot"):
            await control.create(0, snapshot="snap-00000000000000009")
        cluster.daemons[0].ships = False
        (pending,) = await control.snapshot("v")
        with pytest.raises(Conflict, match="wait until it is completed"):
            await control.create(0, snapshot=pending.id)
        await control.delete_snapshot(snapshot)
        with pytest.raises(Conflict, match="being deleted"):
            await control.create(0, snapshot=snapshot)

    run(tmp_path, scenario)


# ---- while it is attached


def test_the_ticket_and_each_heartbeat_say_where_the_source_is_and_how_fast_to_go(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, front_end = await completed(control), cluster.front_ends[0]
        volume = await control.create(0, name="r", snapshot=snapshot)
        attached = await control.attach("r")
        ticket = front_end.volumes[volume.id].ticket
        assert (ticket.maintenance, ticket.source) == (False, attached.source)
        await set_hydration(control, "r", rate_bytes=7 * MIB)
        await set_hydration(control, "r", paused=True)  # What is not said stays.
        old = cluster.daemons[0].endpoint.address
        cluster.daemons[0] = await cluster.daemons[0].restart()
        assert cluster.daemons[0].endpoint.address != old

        async def is_told() -> bool:
            told = front_end.current.get(volume.id)
            return told is not None and (
                told.hydration.rate_bytes,
                told.hydration.paused,
                list(told.source.addresses),
            ) == (
                7 * MIB,
                True,
                [cluster.daemons[0].endpoint.address],
            )

        await until(is_told, "the front-end is told")
        assert (await control.get("r")).hydration.why == "paused"
        front_end.hydrates = True
        await set_hydration(control, "r", paused=False)
        found = await hydrated(control, "r")
        assert not found.HasField("hydration")
        assert found.state == IN_USE
        assert (found.epoch, list((await control.get_snapshot(snapshot)).used_by)) == (attached.epoch, [])
        with pytest.raises(Conflict, match="all its blocks"):
            await set_hydration(control, "r", paused=True)

    run(tmp_path, scenario)


def test_only_the_word_of_the_present_epoch_ends_the_dependence(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, front_end = await completed(control), cluster.front_ends[0]
        volume = await control.create(0, name="r", snapshot=snapshot)
        attached = await control.attach("r")
        beat = control_pb2.FrontEndHeartbeatRequest(
            front_end=front_end.id, instance=front_end.instance, address=front_end.endpoint.address
        )
        beat.volumes.add(volume=volume.id, epoch=attached.epoch - 1, hydrated=True)
        await control.call("FrontEndHeartbeat", beat)
        assert (await control.get("r")).HasField("source")
        beat.volumes[0].epoch, beat.volumes[0].state = attached.epoch, control_pb2.SERVING_STATE_SERVING
        await control.call("FrontEndHeartbeat", beat)
        assert not (await control.get("r")).HasField("source")

    run(tmp_path, scenario)


# ---- under maintenance


def test_volumes_that_nobody_attached_are_hydrated_a_few_at_once(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        names = [f"r{number}" for number in range(MAX_HYDRATING + 2)]
        for name in names:
            await control.create(0, name=name, snapshot=snapshot)

        async def is_full() -> bool:
            return len(maintained(cluster)) == MAX_HYDRATING

        await until(is_full, "as many as may are open")
        whys = [(await control.get(name)).hydration.why for name in names]
        assert sum("its turn" in why for why in whys) == 2
        assert not (await control.status()).problems  # To wait for one's turn is none.
        assert all([(await control.get(name)).state == AVAILABLE for name in names])
        assert len(maintained(cluster)) == MAX_HYDRATING
        cluster.front_ends[0].hydrates = True
        for name in names:
            assert (await hydrated(control, name)).state == AVAILABLE

        async def are_closed() -> bool:
            return not maintained(cluster)

        await until(are_closed, "all are closed")

    run(tmp_path, scenario)


def test_a_user_takes_a_volume_away_from_maintenance_and_it_goes_on_after(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        one, other = cluster.front_ends
        volume = await control.create(0, name="r", snapshot=await completed(control))

        async def is_open() -> bool:
            return volume.id in maintained(cluster)

        await until(is_open, "it is open for maintenance")
        holder, free = (one, other) if volume.id in one.volumes else (other, one)
        epoch = holder.volumes[volume.id].epoch
        attached = await control.attach("r", front_end=free.id)
        assert attached.epoch == epoch + 1

        async def is_taken() -> bool:
            return volume.id not in holder.volumes and not maintained(cluster)

        await until(is_taken, "the other one has let go")
        detached = await control.detach("r")
        assert detached.state == AVAILABLE
        assert detached.epoch in (epoch + 1, epoch + 2), "nothing but maintenance may have come since"
        await until(is_open, "it is open for maintenance again")
        resized = await control.call("ResizeVolume", control_pb2.ResizeVolumeRequest(volume="r", size_bytes=2 * GIB))
        assert resized.state == AVAILABLE

        async def has_new_size() -> bool:
            return any(
                each.volumes[volume.id].ticket.size_bytes == 2 * GIB
                for each in cluster.front_ends
                if volume.id in each.volumes
            )

        await until(has_new_size, "it is opened with its new size")
        assert (await control.delete("r")).deleted
        assert volume.id not in {replica.target.volume for node in cluster.nodes for replica in node.replicas.values()}

    run(tmp_path, scenario, front_ends=2)


def test_a_user_who_attaches_while_it_opens_for_maintenance_is_no_trouble(tmp_path: Path) -> None:
    """What the front-end says then of the epoch before is no news to anybody, and holds nothing up."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        (front_end,) = cluster.front_ends
        snapshot = await completed(control)
        front_end.may_open.clear()
        front_end.opening.clear()
        volume = await control.create(0, name="r", snapshot=snapshot)
        await asyncio.wait_for(front_end.opening.wait(), 60)
        front_end.opening.clear()
        with capture_logs() as logs:
            attaching = asyncio.ensure_future(control.attach("r"))
            await asyncio.wait_for(front_end.opening.wait(), 60)
            front_end.may_open.set()
            assert (await attaching).epoch == 2
            await control.detach("r")

            async def is_open() -> bool:
                return volume.id in maintained(cluster)

            await until(is_open, "it is open for maintenance")
        assert [each for each in logs if each["log_level"] != "info"] == []

    run(tmp_path, scenario, front_ends=1)


def test_maintenance_ends_with_pause_and_moves_when_its_front_end_is_gone(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(0, name="r", snapshot=await completed(control))

        async def is_open() -> bool:
            return maintained(cluster) == [volume.id]

        async def is_closed() -> bool:
            return not maintained(cluster)

        await until(is_open, "it is open for maintenance")
        await set_hydration(control, "r", paused=True)
        await until(is_closed, "it is closed")
        await set_hydration(control, "r", paused=False)
        await until(is_open, "it is open again")
        (holder,) = (each for each in cluster.front_ends if volume.id in each.volumes)
        (other,) = (each for each in cluster.front_ends if each is not holder)
        epoch = holder.volumes[volume.id].epoch
        await holder.stop()
        other.hydrates = True
        assert (await hydrated(control, "r")).epoch > epoch

    run(tmp_path, scenario, front_ends=2, lease_s=1.5)


def test_a_front_end_that_started_anew_gets_a_new_epoch_for_maintenance(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(0, name="r", snapshot=await completed(control))

        async def is_open() -> bool:
            return volume.id in maintained(cluster)

        await until(is_open, "it is open for maintenance")
        old = cluster.front_ends[0]
        epoch = old.volumes[volume.id].epoch
        renewal = control_pb2.RenewAttachmentRequest(volume=volume.id, front_end=old.id, instance=old.instance)
        with pytest.raises(Fenced):  # The attempts are control's.
            await control.call("RenewAttachment", renewal)
        current = control_pb2.GetAttachmentRequest(volume=volume.id, front_end=old.id, epoch=epoch)
        assert (await control.call("GetAttachment", current)).maintenance
        cluster.front_ends[0] = new = await old.restart()
        await until(is_open, "the new process has it")
        assert new.volumes[volume.id].epoch > epoch
        with pytest.raises(Fenced):
            await control.call("GetAttachment", current)

    run(tmp_path, scenario)


def test_what_cannot_be_opened_for_maintenance_is_tried_again_and_says_why(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, front_end = await completed(control), cluster.front_ends[0]
        front_end.outcome = QuorumUnavailable("one member answers")
        await control.create(0, name="r", snapshot=snapshot)

        async def says_why() -> bool:
            return "one member answers" in (await control.get("r")).hydration.why

        await until(says_why, "the reason is shown")

        async def is_a_problem() -> bool:
            return any("hydration stands still" in each.message for each in (await control.status()).problems)

        await until(is_a_problem, "the status has it, which it has not while it is tried again")
        front_end.outcome, front_end.hydrates = None, True
        assert (await hydrated(control, "r")).state == AVAILABLE
        front_end.outcome = Corrupt("records are missing")
        (lost,) = [await control.create(0, name="l", snapshot=snapshot)]

        async def in_error() -> bool:
            return (await control.get(lost.id)).state == control_pb2.VOLUME_STATE_ERROR

        await until(in_error, "lost records are an error, whoever finds them")

    run(tmp_path, scenario)


# ---- what keeps the source


def test_a_source_that_is_deleted_stays_until_its_volumes_are_hydrated(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, daemon = await completed(control), cluster.daemons[0]
        volume = await control.create(0, name="r", snapshot=snapshot)
        await control.attach("r")
        deleting = await control.delete_snapshot(snapshot)
        assert (deleting.state, list(deleting.used_by)) == (DELETING, [volume.id])
        roots = await control.call("GetRoots", snapshot_pb2.GetRootsRequest())
        assert [each.snapshot for each in roots.roots] == [snapshot]
        with pytest.raises(Conflict, match="must stay"):
            await control.call("DropSnapshot", snapshot_pb2.DropSnapshotRequest(daemon=daemon.id, snapshot=snapshot))
        # A snapshot of it refers to what it does not have itself.
        (of_r,) = await control.snapshot("r")
        await in_state(control, of_r.id, COMPLETED)
        task = next(each for each in daemon.shipped if each.snapshot.id == of_r.id)
        assert (task.base, task.base_root, task.base_generation) == (snapshot, root_of(snapshot), 0)
        assert daemon.dropped == []
        cluster.front_ends[0].hydrates = True
        await hydrated(control, "r")
        await gone(control, snapshot)
        assert daemon.dropped == [snapshot]

    run(tmp_path, scenario)


def test_the_first_snapshot_of_a_hydrated_volume_is_still_a_change_of_its_source(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, daemon = await completed(control), cluster.daemons[0]
        cluster.front_ends[0].hydrates = True
        await control.create(0, name="r", snapshot=snapshot)
        await hydrated(control, "r")
        daemon.ships = False
        (first,) = await control.snapshot("r")
        assert (await task_of(daemon, first.id)).base == snapshot
        await control.create(0, name="s", snapshot=snapshot)
        await hydrated(control, "s")
        await control.delete_snapshot(snapshot)
        (second,) = await control.snapshot("s")
        task = await task_of(daemon, second.id)
        assert (task.base, task.base_root) == ("", b"")  # Nothing keeps that source any more.
        daemon.ships = True
        await gone(control, snapshot)

    run(tmp_path, scenario)


def test_what_was_sealed_before_its_volume_was_hydrated_needs_the_source_until_it_is_shipped(tmp_path: Path) -> None:
    """The volume is hydrated without the blocks that its guest wrote after the seal: these nobody else has."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, daemon, front_end = await completed(control), cluster.daemons[0], cluster.front_ends[0]
        await control.create(0, name="r", snapshot=snapshot)
        await control.attach("r")
        daemon.ships = False
        (of_r,) = await control.snapshot("r")
        front_end.hydrates = True
        await control.delete_snapshot(snapshot)
        await hydrated(control, "r")
        request = snapshot_pb2.OpenSnapshotRequest(
            snapshot=of_r.id, front_end=front_end.id, instance=front_end.instance
        )
        found = await control.call("OpenSnapshot", request)
        assert (found.source.snapshot, found.source.root) == (snapshot, root_of(snapshot))
        task = await task_of(daemon, of_r.id)
        assert (task.base, task.base_root) == (snapshot, root_of(snapshot))
        fail = snapshot_pb2.FailSnapshotRequest(daemon=daemon.id, instance=daemon.instance, snapshot=of_r.id)
        await control.call("FailSnapshot", fail)
        with pytest.raises(Conflict, match="must stay"):
            await control.call("DropSnapshot", snapshot_pb2.DropSnapshotRequest(daemon=daemon.id, snapshot=snapshot))
        daemon.ships = True
        await control.call("RetrySnapshot", snapshot_pb2.RetrySnapshotRequest(snapshot=of_r.id))
        await in_state(control, of_r.id, COMPLETED)
        assert daemon.shipped[-1].base == snapshot
        await gone(control, snapshot)

    run(tmp_path, scenario, lease_s=1.0)


def test_a_volume_that_is_deleted_before_it_is_hydrated_lets_its_source_go(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        await control.create(0, name="r", snapshot=snapshot)
        await control.delete_snapshot(snapshot)
        assert (await control.delete("r")).deleted
        await gone(control, snapshot)

    run(tmp_path, scenario)


# ---- status


def test_the_status_tells_of_snapshots_sources_and_daemons(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot, daemon = await completed(control), cluster.daemons[0]
        assert not (await control.status()).problems
        daemon.ships = False
        volume = await control.create(0, name="r", snapshot=snapshot)
        await control.attach("r")
        (failing,), (pending,) = await control.snapshot("v"), await control.snapshot("v")
        await task_of(daemon, failing.id)
        request = snapshot_pb2.FailSnapshotRequest(
            daemon=daemon.id, instance=daemon.instance, snapshot=failing.id, reason="no room"
        )
        await control.call("FailSnapshot", request)
        await daemon.stop()

        expected = {
            (daemon.id, control_pb2.SEVERITY_DEGRADED),
            (failing.id, control_pb2.SEVERITY_WARNING),
            (pending.id, control_pb2.SEVERITY_DEGRADED),
            (volume.id, control_pb2.SEVERITY_DEGRADED),
        }

        async def are_told() -> Any:
            problems = (await control.status()).problems
            return problems if {(each.subject, each.severity) for each in problems} == expected else None

        told = {each.subject: each.message for each in await until(are_told, "the daemon is down, and nothing else")}
        assert "no room; retry or delete it" in told[failing.id]
        assert "cairn snapshotd run" in told[pending.id]
        assert "cairn snapshotd run" in told[volume.id]

    run(tmp_path, scenario, lease_s=1.5)
