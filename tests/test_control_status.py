"""What `cairn status` says, and why: each way in which a cluster can be less than well."""

from pathlib import Path

from blockstore.rpc import control_pb2
from blockstore.rpc.replica_pb2 import Position, ReplicaStatus, Target
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, until
from tests.control_scenario import run
from tests.patient_time import run_patiently

WARNING = control_pb2.SEVERITY_WARNING
DEGRADED = control_pb2.SEVERITY_DEGRADED
UNAVAILABLE = control_pb2.SEVERITY_UNAVAILABLE


async def problem(control: Control, severity: int, subject: str, words: str) -> control_pb2.StatusResponse:
    """The status as soon as it has such a problem."""

    async def is_there() -> control_pb2.StatusResponse | None:
        status = await control.status()
        found = any(
            (each.severity, each.subject) == (severity, subject) and words in each.message for each in status.problems
        )
        return status if found else None

    status: control_pb2.StatusResponse = await until(is_there, f"a problem of {subject}: {words}")
    return status


def states(status: control_pb2.StatusResponse) -> list[str]:
    return sorted(replica.state for volume in status.volumes for replica in volume.replicas)


def test_a_cluster_that_is_well_has_no_problems(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="idle")
        await control.create(name="v")
        await control.attach("v")

        async def well() -> control_pb2.StatusResponse | None:
            status = await control.status()
            serving = {volume.volume.name: volume.serving for volume in status.volumes}
            good = states(status) == ["up"] * 6 and serving == {"idle": "", "v": "serving"}
            return status if good and not status.problems else None

        status: control_pb2.StatusResponse = await until(well, "all is well")
        assert status.healthy
        assert [each.up for each in status.nodes] == [True] * 3
        assert [(each.up, each.volumes) for each in status.front_ends] == [(True, 1)]

    run(tmp_path, scenario)


def test_one_node_down_is_degraded_and_two_are_unavailable(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        await cluster.nodes[0].stop()
        status = await problem(control, DEGRADED, volume.id, "last heard")
        assert not status.healthy
        assert states(status) == ["down", "up", "up"]
        assert any((each.severity, each.subject) == (DEGRADED, cluster.nodes[0].id) for each in status.problems)
        await cluster.nodes[1].stop()
        status = await problem(control, UNAVAILABLE, volume.id, "1 of 3 replicas")
        assert status.problems[0].severity == UNAVAILABLE  # The worst comes first.

    run(tmp_path, scenario, lease_s=2.0)


def test_a_node_without_replicas_is_missed_less(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await cluster.nodes[0].stop()
        status = await problem(control, WARNING, cluster.nodes[0].id, "down")
        assert status.healthy

    run(tmp_path, scenario, lease_s=2.0)


def test_a_replica_that_its_node_no_longer_has_is_down(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()

        async def reported() -> bool:
            return states(await control.status()) == ["up"] * 3

        await until(reported, "all are up")
        cluster.nodes[0].replicas.clear()
        status = await problem(control, DEGRADED, volume.id, "emptied")
        assert states(status) == ["down", "up", "up"]

    run(tmp_path, scenario, lease_s=2.0)


def test_what_is_left_of_broken_replicas_is_named_until_it_is_gone(tmp_path: Path) -> None:
    """Also of one that no volume has any more."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        node = cluster.nodes[0]
        (lost,) = node.replicas
        node.replicas.clear()
        node.broken = {"/data/replicas/rep-1.broken": lost}
        status = await problem(control, WARNING, node.id, f"replica {lost} nor whose they are can be read")
        (said,) = (each.message for each in status.problems if each.subject == node.id)
        assert "in /data/replicas/rep-1.broken: another replica takes its place; keep this" in said
        await problem(control, DEGRADED, volume.id, "can make nothing of what is left of it")
        node.broken = {"/data/replicas/rep-2.broken": "rep-2"}
        await problem(
            control, WARNING, node.id, "/data/replicas/rep-2.broken: no volume has that replica any more: remove"
        )
        node.broken = {}

        async def silent() -> bool:
            return not any(each.subject == node.id for each in (await control.status()).problems)

        await until(silent, "nobody to be told any more")

    run(tmp_path, scenario)


def test_a_detached_volume_shows_who_lags(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        for node, sequence in zip(cluster.nodes, (100, 100, 60), strict=True):
            (held,) = node.replicas.values()
            held.end.CopyFrom(Position(epoch=1, sequence=sequence))
        status = await problem(control, DEGRADED, volume.id, "lacks 40 records")
        replicas = {each.node: each for each in status.volumes[0].replicas}
        behind = replicas[cluster.nodes[2].id]
        assert (behind.state, behind.lag_records, behind.end.sequence) == ("catching-up", 40, 60)
        assert replicas[cluster.nodes[0].id].lag_records == 0

    run(tmp_path, scenario)


def test_words_of_different_times_are_no_lag(tmp_path: Path) -> None:
    """One node has told of the records that were just written, the other two have not beaten since."""

    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create()
        for node in cluster.nodes:
            await node.fall_silent()
        one = cluster.nodes[0]
        (held,) = one.replicas.values()
        held.end.CopyFrom(Position(epoch=1, sequence=40))
        await one.report(control.stub)
        status = await control.status()
        assert max(replica.end.sequence for replica in status.volumes[0].replicas) == 40
        assert states(status) == ["up"] * 3

    run(tmp_path, scenario)


def test_what_the_front_end_says_of_a_replica_counts(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.attach("v")
        members = volume.segments[0].configuration.members
        report = control_pb2.VolumeReport(volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_SERVING)
        report.members.add(replica=members[0].replica, connected=True, whole=True, lag_records=3)
        report.members.add(
            replica=members[1].replica, connected=True, whole=True, lag_records=900, degraded_why="fetching its log"
        )
        report.members.add(replica=members[2].replica, connected=True, whole=False, extents_done=3, extents_total=8)
        cluster.front_ends[0].says[volume.id] = report
        status = await problem(control, DEGRADED, volume.id, "fetching its log")
        one, two, three = status.volumes[0].replicas
        assert (one.state, one.lag_records, one.why) == ("up", 3, "")
        assert (two.state, two.lag_records) == ("catching-up", 900)
        assert (three.state, three.extents_done, three.extents_total) == ("filling", 3, 8)
        report.members[2].connected = False
        await problem(control, DEGRADED, volume.id, "cannot reach it")

    run(tmp_path, scenario)


def test_a_volume_that_is_not_served_says_why(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        await control.attach("v")
        cluster.front_ends[0].says[volume.id] = control_pb2.VolumeReport(
            volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_FAILED, why="no quorum since a while"
        )
        status = await problem(control, UNAVAILABLE, volume.id, "no quorum since a while")
        assert status.volumes[0].serving == "failed"
        cluster.front_ends[0].says[volume.id] = control_pb2.VolumeReport(
            volume=volume.id, epoch=1, state=control_pb2.SERVING_STATE_SERVING, lacks_room="full: node-1; away: node-2"
        )
        await problem(control, UNAVAILABLE, volume.id, "wait or fail with ENOSPC (full: node-1; away: node-2): free")
        await cluster.front_ends[0].stop()
        await problem(control, UNAVAILABLE, volume.id, "is down")
        await problem(control, UNAVAILABLE, cluster.front_ends[0].id, "1 volumes attached")

    run(tmp_path, scenario, lease_s=2.0)


def test_full_disks_bad_blocks_and_strangers_are_told(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        full, bad, strange = cluster.nodes
        full.full = True
        await problem(
            control,
            DEGRADED,
            full.id,
            f"free space on its disk, or move its replicas away (cairn node drain {full.id})",
        )
        (held,) = bad.replicas.values()
        held.corrupt_blocks_found, held.corrupt_blocks_repaired = 5, 3
        await problem(control, DEGRADED, bad.id, "2 bad blocks")
        held.damage = "the row 00 fails its checksum"
        await problem(control, DEGRADED, bad.id, "the row 00 fails its checksum")
        stranger = "rep-fffffffffffffffff"
        target = Target(volume="vol-fffffffffffffffff", replica=stranger)
        strange.replicas[stranger] = ReplicaStatus(target=target, whole=True)
        await problem(control, WARNING, strange.id, "left alone")
        assert stranger in strange.replicas
        assert (await control.get(volume.id)).state == control_pb2.VOLUME_STATE_AVAILABLE

    run(tmp_path, scenario)


def test_after_a_restart_nothing_is_guessed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path) as cluster:
            async with cluster.control() as control:
                await control.create(GIB)
            for node in cluster.nodes:
                await node.stop()
            cluster.nodes.clear()
            async with cluster.control() as control:
                status = await control.status()
                assert states(status) == ["unknown"] * 3
                assert not status.healthy
                assert {each.last_heartbeat_ms for each in status.nodes} == {0}

    run_patiently(scenario())
