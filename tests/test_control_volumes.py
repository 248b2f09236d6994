"""Volumes made, grown and deleted by control, with nodes and front-ends that answer over real gRPC."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from blockstore.config import Placement
from blockstore.errors import AlreadyExists, Conflict, InvalidRequest, NoSpace, NotFound, QuorumUnavailable
from blockstore.rpc import control_pb2
from blockstore.units import GIB, MAX_VOLUME_SIZE
from tests.control_cluster import Cluster, Control, MemoryNode, cluster_at, expected_replicas, until
from tests.control_scenario import run, until_down
from tests.patient_time import run_patiently

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE
ERROR = control_pb2.VOLUME_STATE_ERROR
CREATING = control_pb2.VOLUME_STATE_CREATING

# ---- creating


def test_a_new_volume_is_available_with_three_replicas_in_three_zones(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(3 * GIB, name="data", tags={"team": "db"})
        assert (volume.state, volume.size_bytes, volume.name) == (AVAILABLE, 3 * GIB, "data")
        assert volume.id.startswith("vol-")
        assert dict(volume.tags) == {"team": "db"}
        assert volume.created_at_ms > 1_600_000_000_000
        assert not volume.warnings
        members = volume.segments[0].configuration.members
        assert {member.zone for member in members} == {"zone-1", "zone-2", "zone-3"}
        assert {member.address for member in members} == {node.endpoint.address for node in cluster.nodes}
        assert cluster.held() == expected_replicas([volume])
        assert await control.get("data") == await control.get(volume.id)

    run(tmp_path, scenario)


def test_the_same_token_gives_the_same_volume_also_at_once(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        made = await asyncio.gather(*(control.create(GIB, name="v", client_token="t") for _ in range(5)))
        assert len({volume.id for volume in made}) == 1
        assert len(await control.volumes()) == 1
        assert len(cluster.held()) == 3
        with pytest.raises(Conflict, match="used for another volume"):
            await control.create(2 * GIB, name="v", client_token="t")

    run(tmp_path, scenario)


def test_a_name_is_unique_until_its_volume_is_gone(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        with pytest.raises(AlreadyExists, match="'v' is taken"):
            await control.create(name="v")
        await asyncio.gather(*(control.create() for _ in range(2)))  # Without a name as many as you like.
        assert (await control.delete("v")).deleted
        await control.create(name="v")

    run(tmp_path, scenario)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size_bytes": 0}, "0 bytes"),
        ({"size_bytes": 4097}, "multiple of 4096"),
        ({"size_bytes": MAX_VOLUME_SIZE + 4096}, "multiple of 4096"),
        ({"name": "-x"}, "no name"),
        ({"name": "a/b"}, "no name"),
        ({"name": "vol-0123456789abcdef0"}, "no name"),
        ({"name": "x" * 129}, "no name"),
        ({"tags": {"": "v"}}, "tag ''"),
        ({"tags": {"k": "v" * 257}}, "tag 'k'"),
        ({"tags": {str(number): "" for number in range(51)}}, "51 tags"),
        ({"client_token": "t" * 65}, "token"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await control.create(**{"size_bytes": GIB, **fields})
        assert await control.volumes() == []

    run(tmp_path, scenario)


def test_two_nodes_are_too_few(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        with pytest.raises(QuorumUnavailable, match="there are 2"):
            await control.create()

    run(tmp_path, scenario, nodes=2, lease_s=1.5)


@pytest.mark.parametrize("placement", Placement)
def test_with_too_few_zones_it_refuses_or_warns(tmp_path: Path, placement: Placement) -> None:
    async def scenario() -> None:
        async with cluster_at(tmp_path, nodes=0) as cluster:
            cluster.nodes = [MemoryNode.make(number, zone) for number, zone in ((1, "a"), (2, "a"), (3, "b"))]
            for node in cluster.nodes:
                await node.start()
            async with cluster.control(placement=placement, lease_s=1.5) as control:
                if placement is Placement.STRICT:
                    with pytest.raises(Conflict, match=r"2 zones \(a, b\)"):
                        await control.create()
                    return
                volume = await control.create()
                assert volume.state == AVAILABLE
                assert "2 zones" in volume.warnings[0]

                async def warns_of_it_alone() -> bool:
                    problems = [(each.severity, each.subject) for each in (await control.status()).problems]
                    return problems == [(control_pb2.SEVERITY_WARNING, volume.id)]

                await until(warns_of_it_alone, "the status warns of the volume, and of nothing else")

    run_patiently(scenario())


def test_it_goes_on_creating_when_a_node_comes_back(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        cluster.nodes[1].refuses = NoSpace("no room")
        creating = asyncio.ensure_future(control.create())

        async def waits() -> bool:
            volumes = await control.volumes()
            return bool(volumes) and "no room" in volumes[0].reason

        await until(waits, "the reason is shown")
        assert (await control.volumes())[0].state == CREATING
        cluster.nodes[1].refuses = None
        volume = await creating
        assert (volume.state, volume.reason) == (AVAILABLE, "")

    run(tmp_path, scenario)


def test_a_replica_that_can_never_be_made_is_an_error_with_its_reason(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        cluster.nodes[0].refuses = AlreadyExists("that replica belongs to another volume")
        with pytest.raises(Conflict, match="belongs to another volume"):
            await control.create(name="v")
        volume = await control.get("v")
        assert volume.state == ERROR
        with pytest.raises(Conflict, match="in error"):
            await control.attach("v", accept_loss=True)
        cluster.nodes[0].refuses = None
        assert (await control.delete("v")).deleted
        assert cluster.held() == {}

    run(tmp_path, scenario)


def test_volumes_spread_by_free_space(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        for _ in range(4):
            await control.create(10 * GIB)
        counts = [len(node.replicas) for node in cluster.nodes]
        assert sorted(counts) == [2, 2, 2, 3, 3]

    run(tmp_path, scenario, nodes=5)


# ---- growing, deleting


def test_a_volume_grows_also_while_attached_and_never_shrinks(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(GIB, name="v")

        async def resize(size_bytes: int) -> control_pb2.Volume:
            request = control_pb2.ResizeVolumeRequest(volume="v", size_bytes=size_bytes)
            resized: control_pb2.Volume = await control.call("ResizeVolume", request)
            return resized

        assert (await resize(2 * GIB)).segments[0].size_bytes == 2 * GIB
        await control.attach("v")
        assert (await resize(3 * GIB)).size_bytes == 3 * GIB
        assert cluster.front_ends[0].volumes[volume.id].size_bytes == 3 * GIB
        with pytest.raises(InvalidRequest, match="only grow"):
            await resize(GIB)
        with pytest.raises(InvalidRequest, match="multiple"):
            await resize(3 * GIB + 1)

    run(tmp_path, scenario)


def test_delete_waits_for_detach_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        await control.attach("v")
        with pytest.raises(Conflict, match="detach it first"):
            await control.delete("v")
        await control.detach("v")
        assert (await control.delete("v")).deleted
        assert cluster.held() == {}
        with pytest.raises(NotFound, match="no volume 'v'"):
            await control.get("v")

    run(tmp_path, scenario)


def test_a_node_that_was_away_deletes_its_replica_when_it_comes_back(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        away = cluster.nodes[2]
        await away.stop()
        await until_down(control, away.id)
        assert (await control.delete("v")).deleted
        assert set(cluster.held().values()) == {away.id}
        cluster.nodes[2] = back = await away.restart()

        async def is_empty() -> bool:
            return not back.replicas

        await until(is_empty, "its replica is deleted")

    run(tmp_path, scenario, lease_s=2.0)


def test_deleting_goes_on_in_the_background_where_a_node_fails(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        await control.create(name="v")
        cluster.nodes[0].refuses = QuorumUnavailable("busy")
        answer = await control.delete("v")
        assert not answer.deleted
        assert (await control.get("v")).state == control_pb2.VOLUME_STATE_DELETING
        with pytest.raises(Conflict, match="being deleted"):
            await control.attach("v")
        cluster.nodes[0].refuses = None

        async def is_gone() -> bool:
            return not await control.volumes()

        await until(is_gone, "the volume is gone")
        assert cluster.held() == {}

    run(tmp_path, scenario)
