"""Volumes that are being created, or that grow, when a node that they were placed on goes away for good."""

import asyncio
from pathlib import Path

import pytest

from blockstore.errors import QuorumUnavailable
from blockstore.rpc import control_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, MemoryNode, expected_replicas, until
from tests.control_scenario import run, until_down

AVAILABLE = control_pb2.VOLUME_STATE_AVAILABLE
LEASE_S = 2.0
REPLACE_AFTER_S = 3.0


async def reason(control: Control, text: str) -> None:
    """Waits until the volume says so."""

    async def is_said() -> bool:
        return text in (await control.get("v")).reason

    await until(is_said, f"{text!r} is the reason")


async def half_created(cluster: Cluster, control: Control) -> MemoryNode:
    """A volume that waits for a node which has made its replica, and has gone since."""
    late, gone = cluster.nodes[:2]
    late.refuses = QuorumUnavailable("busy")
    creating = asyncio.ensure_future(control.create(GIB, name="v"))
    await until(lambda: _has_one(gone), "its replica is made")
    creating.cancel()
    assert {late.id, gone.id} <= nodes_of(await control.get("v"))
    await gone.stop()
    await until_down(control, gone.id)
    late.refuses = None
    return gone


async def _has_one(node: MemoryNode) -> bool:
    return bool(node.replicas)


async def until_available(control: Control) -> control_pb2.Volume:
    async def available() -> control_pb2.Volume | None:
        volume = await control.get("v")
        return volume if volume.state == AVAILABLE else None

    found: control_pb2.Volume = await until(available, "it is available")
    return found


async def until_tidy(cluster: Cluster, volume: control_pb2.Volume) -> None:
    async def is_tidy() -> bool:
        return cluster.held() == expected_replicas([volume])

    await until(is_tidy, "nobody has a replica of an earlier plan")


def nodes_of(volume: control_pb2.Volume) -> set[str]:
    return {member.node for each in volume.segments for member in each.configuration.members}


def test_a_new_volume_goes_to_other_nodes_where_one_of_its_own_is_lost(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        cluster.nodes[3].used_bytes = 50 * GIB  # the first three are chosen
        await until(lambda: _is_loaded(control, cluster.nodes[3]), "control knows")
        gone = await half_created(cluster, control)
        await reason(control, f"{gone.id} is down; the volume is placed on other nodes where it is away for longer")
        volume = await until_available(control)
        assert (volume.reason, volume.epoch) == ("", 0)
        assert nodes_of(volume) == {each.id for each in cluster.nodes if each is not gone}
        assert await control.attach("v")
        cluster.nodes[1] = await gone.restart()
        await until_tidy(cluster, volume)

    run(tmp_path, scenario, nodes=4, lease_s=LEASE_S, replace_after_s=REPLACE_AFTER_S)


async def _is_loaded(control: Control, node: MemoryNode) -> bool:
    return any(each.id == node.id and each.used_bytes for each in (await control.status()).nodes)


def test_without_other_nodes_it_says_so_and_waits_for_its_own(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        gone = await half_created(cluster, control)
        await reason(control, f"{gone.id} is down for long, and no others can have its replicas: ")
        before = nodes_of(await control.get("v"))
        cluster.nodes[1] = await gone.restart()
        volume = await until_available(control)
        assert nodes_of(volume) == before
        await until_tidy(cluster, volume)

    run(tmp_path, scenario, lease_s=LEASE_S, replace_after_s=REPLACE_AFTER_S)


def test_where_nothing_is_replaced_it_waits_and_can_be_deleted(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        gone = await half_created(cluster, control)
        await reason(control, f"{gone.id} is down; start it, or delete the volume")
        assert (await control.delete("v")).deleted
        cluster.nodes[1] = await gone.restart()

        async def is_empty() -> bool:
            return not cluster.held()

        await until(is_empty, "nothing is left of it")

    run(tmp_path, scenario, lease_s=LEASE_S, replace_after_s=0.0)


# ---- growing


async def grow(control: Control) -> control_pb2.Volume:
    request = control_pb2.ResizeVolumeRequest(volume="v", size_bytes=2 * GIB)
    grown: control_pb2.Volume = await control.call("ResizeVolume", request)
    return grown


async def to_grow(cluster: Cluster, control: Control) -> MemoryNode:
    """A volume of one segment, and the node that further ones are placed on first."""
    volume = await control.create(GIB, name="v", segment_size_bytes=GIB)
    [free] = [node for node in cluster.nodes if node.id not in nodes_of(volume)]
    return free


def test_growth_goes_on_by_itself_on_other_nodes_where_one_is_lost(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        gone = await to_grow(cluster, control)
        gone.refuses = QuorumUnavailable("busy")
        with pytest.raises(QuorumUnavailable, match="busy"):
            await grow(control)
        await gone.stop()

        async def has_grown() -> bool:
            return (await control.get("v")).size_bytes == 2 * GIB

        await until(has_grown, "it is as large as was asked for")
        volume = await control.get("v")
        assert gone.id not in nodes_of(volume)
        assert volume.growing_to_bytes == 0
        await until_tidy(cluster, volume)

    run(tmp_path, scenario, nodes=4, lease_s=LEASE_S, replace_after_s=REPLACE_AFTER_S)


def test_a_create_that_is_late_leaves_no_replica_of_a_plan_that_was_dropped(tmp_path: Path) -> None:
    async def scenario(cluster: Cluster, control: Control) -> None:
        gone = await to_grow(cluster, control)
        late = next(node for node in cluster.nodes if node is not gone)
        late.may_create.clear()
        first = asyncio.ensure_future(grow(control))
        await late.creating.wait()
        await gone.stop()
        await until_down(control, gone.id)
        second = asyncio.ensure_future(grow(control))

        async def is_dropped() -> bool:
            return not any(gone.id == each.id and each.replicas for each in (await control.status()).nodes)

        await until(is_dropped, "it is placed anew")
        late.may_create.set()
        assert (await second).size_bytes == 2 * GIB
        await asyncio.gather(first, return_exceptions=True)
        cluster.nodes[cluster.nodes.index(gone)] = await gone.restart()
        await until_tidy(cluster, await control.get("v"))

    run(tmp_path, scenario, nodes=4, lease_s=LEASE_S, call_timeout_s=60.0)
