"""Control and volumes of several segments: placed over all nodes, grown, killed in the middle, deleted."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, InvalidRequest, QuorumUnavailable
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import GIB, MIB
from tests.control_cluster import Cluster, Control, cluster_at, expected_replicas, until
from tests.control_scenario import until_down
from tests.control_snapshots import completed, run
from tests.control_stopping import at_every_point, stop_at

#: More than a resize has steps.
MOST_STEPS = 60


async def grow(control: Control, size_bytes: int = 3 * GIB) -> control_pb2.Volume:
    request = control_pb2.ResizeVolumeRequest(volume="v", size_bytes=size_bytes)
    grown: control_pb2.Volume = await control.call("ResizeVolume", request)
    return grown


async def double(control: Control) -> control_pb2.Volume:
    return await grow(control, 2 * GIB)


def sizes(volume: control_pb2.Volume) -> list[int]:
    return [each.size_bytes for each in volume.segments]


def test_segments_are_spread_over_all_nodes_and_go_with_the_volume(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(5 * GIB, name="v", segment_size_bytes=GIB)
        assert sizes(volume) == [GIB] * 5
        assert sorted(len(node.replicas) for node in cluster.nodes) == [3] * 5
        assert cluster.held() == expected_replicas([volume])
        health = (await control.status()).volumes[0]
        assert [each.segment for each in health.replicas] == [number for number in range(5) for _ in range(3)]
        assert (await control.delete("v")).deleted
        assert cluster.held() == {}
        with pytest.raises(InvalidRequest, match="multiple of 1 MiB"):
            await control.create(GIB, segment_size_bytes=MIB + 1)

    run(tmp_path, scenario, nodes=5)


def test_only_what_has_something_of_the_source_is_made_from_it(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        snapshot = await completed(control)
        volume = await control.create(3 * GIB, snapshot=snapshot, segment_size_bytes=GIB // 2)
        sources = {replica: source for node in cluster.nodes for replica, source in node.sources.items()}
        found = [{sources[member.replica] for member in segment.configuration.members} for segment in volume.segments]
        assert found == [{snapshot.encode()}] * 2 + [{b""}] * 4  # The snapshot has one GiB.

    run(tmp_path, scenario)


def test_a_volume_grows_by_segments_while_it_is_attached(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(GIB // 2, name="v", segment_size_bytes=GIB)
        await control.attach("v")
        grown = await grow(control)
        assert (sizes(grown), grown.growing_to_bytes) == ([GIB] * 3, 0)
        assert grown.segments[0].configuration == (await control.get(volume.id)).segments[0].configuration
        assert cluster.front_ends[0].volumes[volume.id].size_bytes == 3 * GIB
        assert cluster.held() == expected_replicas([grown])
        with pytest.raises(InvalidRequest, match="only grow"):
            await grow(control, 2 * GIB)

    run(tmp_path, scenario, nodes=4)


def test_a_node_that_is_down_stops_growth_until_it_is_placed_anew(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(GIB, name="v", segment_size_bytes=GIB)
        used = {member.node for member in volume.segments[0].configuration.members}
        # The least loaded node is among those of any further segment; there it cannot be created.
        (last,) = [node for node in cluster.nodes if node.id not in used]
        last.refuses = QuorumUnavailable("busy")
        with pytest.raises(QuorumUnavailable, match="busy"):
            await grow(control)
        now = await control.get("v")
        assert (now.size_bytes, now.growing_to_bytes, sizes(now)) == (GIB, 3 * GIB, [GIB])
        with pytest.raises(Conflict, match="being enlarged"):
            await grow(control, 4 * GIB)
        await last.stop()
        await until_down(control, last.id)
        grown = await grow(control)
        assert sizes(grown) == [GIB] * 3
        assert last.id not in {member.node for each in grown.segments for member in each.configuration.members}
        index = cluster.nodes.index(last)
        cluster.nodes[index] = await last.restart()

        async def is_tidy() -> bool:
            return cluster.held() == expected_replicas([grown])

        await until(is_tidy, "replicas of the first plan are gone")

    run(tmp_path, scenario, nodes=4, lease_s=2.0)


def test_a_volume_that_is_growing_can_be_deleted(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(GIB, name="v", segment_size_bytes=GIB)
        cluster.nodes[0].refuses = QuorumUnavailable("busy")
        with pytest.raises(QuorumUnavailable, match="busy"):
            await grow(control)
        cluster.nodes[0].refuses = None
        await control.delete("v")

        async def is_gone() -> bool:
            return not await control.volumes() and cluster.held() == {}

        await until(is_gone, "the volume and all of its replicas are gone")

    run(tmp_path, scenario)


@pytest.mark.timeout(400)
def test_control_may_be_killed_at_any_step_of_growing(tmp_path: Path) -> None:
    async def one(directory: Path, point: int) -> bool:
        async with cluster_at(directory, nodes=4) as cluster:
            async with cluster.control() as control:
                await control.create(GIB, name="v", segment_size_bytes=GIB)
                await control.attach("v")
            reached = await stop_at(cluster, double, point)
            async with cluster.control() as control:

                async def at_rest() -> bool:
                    (volume,) = await control.volumes()
                    return not volume.growing_to_bytes and cluster.held() == expected_replicas([volume])

                await until(at_rest, f"at rest after a stop at step {point}")
                assert sizes(await double(control)) == [GIB] * 2
                await until(at_rest, f"at rest after a stop at step {point} and a retry")
            return reached

    at_every_point(tmp_path, one, MOST_STEPS)


def test_a_snapshot_of_several_segments_is_held_like_one_of_several_volumes(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(3 * GIB, name="v", segment_size_bytes=GIB)
        await control.create(GIB, name="w", segment_size_bytes=GIB)
        (several,), (one,) = await control.snapshot("v"), await control.snapshot("w")
        assert several.barrier.startswith("barrier-")
        assert one.barrier == ""
        assert several.state == snapshot_pb2.SNAPSHOT_STATE_PENDING

    run(tmp_path, scenario)
