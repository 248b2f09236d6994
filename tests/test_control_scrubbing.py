"""Scrub as control sees it: it begins passes, tells nodes where members are, and says what is wrong and what to do."""

from pathlib import Path

import pytest

from blockstore.errors import Conflict, NotFound
from blockstore.rpc import control_pb2
from blockstore.rpc.replica_pb2 import Divergence, ScrubStatus
from blockstore.units import MAX_GENERATION
from tests.control_cluster import Cluster, Control, until
from tests.control_scenario import run
from tests.test_control_status import DEGRADED, problem


async def scrub(control: Control, volume: str, rate_bytes: int = 0) -> list[control_pb2.StartedScrub]:
    request = control_pb2.ScrubVolumeRequest(volume=volume, rate_bytes=rate_bytes)
    answer: control_pb2.ScrubVolumeResponse = await control.call("ScrubVolume", request)
    return list(answer.replicas)


def test_a_scrub_begins_at_each_node_that_is_up_and_names_the_others(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create(name="v")
        started = await scrub(control, "v", 5)
        assert [(each.number, each.why) for each in started] == [(1, "")] * 3
        members = {each.replica: each for each in volume.segments[0].configuration.members}
        for node in cluster.nodes:
            (request,) = node.scrubs
            assert request.rate_bytes == 5
            assert members[request.target.replica].node == node.id
            assert request.target.volume == volume.id
            others = {each.replica: each.address for each in request.peers}
            assert others == {
                replica: each.address for replica, each in members.items() if replica != request.target.replica
            }

    run(tmp_path, scenario)


def test_nodes_that_are_down_or_refuse_are_told_with_why(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        down, refusing, _ = cluster.nodes
        await down.stop()
        refusing.refuses = Conflict("not now")
        await problem(control, DEGRADED, volume.id, "last heard")
        by_node = {each.node: each.replica for each in volume.segments[0].configuration.members}
        started = {each.replica: each for each in await scrub(control, volume.id)}
        assert started[by_node[down.id]].number == 0
        assert f"{down.id} is down" in started[by_node[down.id]].why
        assert "not now" in started[by_node[refusing.id]].why
        assert sorted(each.number for each in started.values()) == [0, 0, 1]

    run(tmp_path, scenario, lease_s=2.0)


def test_a_volume_that_is_not_there_cannot_be_scrubbed(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        with pytest.raises(NotFound):
            await scrub(control, "nobody")

    run(tmp_path, scenario)


def test_a_node_that_does_not_know_the_members_is_told(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        first = cluster.nodes[0]
        (status,) = first.replicas.values()
        assert first.peers == {}
        status.needs_peers = True
        await until(lambda: _known(first.peers), "the answer to a heartbeat says it")
        (told,) = first.peers.values()
        members = volume.segments[0].configuration.members
        assert {each.address for each in told} == {each.address for each in members if each.node != first.id}

    async def _known(peers: object) -> bool:
        return bool(peers)

    run(tmp_path, scenario)


def test_what_a_scrub_leaves_is_a_problem_with_its_place_and_what_to_do(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        volume = await control.create()
        first, second, _ = cluster.nodes
        (status,) = first.replicas.values()
        (peer,) = second.replicas
        found = Divergence(block=77, generation=MAX_GENERATION, peer=peer, sequence=9, what="they show this and that")
        status.scrub.CopyFrom(ScrubStatus(number=1, ended=1, divergences=[found], extents_differing=3))
        place = f"{peer} differ in block 77 (byte {77 * 4096}) of the current content, as of record 9: they show this"
        await problem(control, DEGRADED, volume.id, place)
        await problem(control, DEGRADED, volume.id, "docs/storage.md")
        await problem(control, DEGRADED, volume.id, "in 2 more extents")
        status.scrub.divergences[0].generation = 4
        await problem(control, DEGRADED, volume.id, "of the snapshot of generation 4")
        status.scrub.CopyFrom(ScrubStatus(number=1, ended=1, extents_bad=2))
        answer = await problem(control, DEGRADED, first.id, "left 2 extents")
        assert not answer.healthy
        (health,) = answer.volumes
        assert sorted(each.scrub.extents_bad for each in health.replicas) == [0, 0, 2]

    run(tmp_path, scenario)
