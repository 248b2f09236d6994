"""Control stopped at every step of a drain: the next one carries on; no replica is lost, left over or made twice."""

from pathlib import Path

import pytest

from blockstore.rpc import control_pb2
from blockstore.units import GIB
from tests.control_cluster import Cluster, Control, cluster_at, expected_replicas, until
from tests.control_stopping import at_every_point, stop_at

#: More than a drain of one volume has steps.
MOST_STEPS = 60


async def first_node(control: Control) -> str:
    """The node of the first member that the volume was made with, drained or not."""
    draining = [each.id for each in (await control.status()).nodes if each.draining]
    return draining[0] if draining else (await control.get("v")).segments[0].configuration.members[0].node


async def drain(control: Control) -> object:
    node = await first_node(control)
    await control.call("DrainNode", control_pb2.DrainNodeRequest(node=node))

    async def is_empty() -> bool:
        found = await control.call("GetNode", control_pb2.GetNodeRequest(node=node))
        return not found.replicas

    return await until(is_empty, f"{node} is empty")


async def at_rest(control: Control, cluster: Cluster) -> bool:
    """No change is under way, nothing waits for its turn, and the nodes hold exactly the catalog's replicas."""
    volumes = await control.volumes()
    configuration = volumes[0].segments[0].configuration
    changing = configuration.old_members or configuration.HasField("replacement")
    drained = [each.replicas for each in (await control.status()).nodes if each.draining]
    return not changing and not any(drained) and cluster.held() == expected_replicas(volumes)


@pytest.mark.timeout(400)  # some forty clusters, one after the other
@pytest.mark.parametrize("attached", [True, False])
def test_control_may_be_killed_at_any_step_of_a_drain(tmp_path: Path, attached: bool) -> None:
    async def one(directory: Path, point: int) -> bool:
        async with cluster_at(directory, nodes=4) as cluster:
            async with cluster.control() as control:
                await control.create(GIB, name="v")
                if attached:
                    await control.attach("v")
                before = dict(cluster.held())
            reached = await stop_at(cluster, drain, point)
            async with cluster.control() as control:
                await until(lambda: at_rest(control, cluster), f"at rest after a stop at step {point}")
                await drain(control)
                await until(lambda: at_rest(control, cluster), f"at rest after a stop at step {point} and a retry")
                check_end(cluster, await control.get("v"), before)
            return reached

    at_every_point(tmp_path, one, MOST_STEPS)


def check_end(cluster: Cluster, volume: control_pb2.Volume, before: dict[str, str]) -> None:
    """One replica is another one, elsewhere; it took two steps and no more."""
    after = cluster.held()
    assert len(after) == 3
    assert len(after.keys() & before.keys()) == 2
    assert len(set(after.values())) == 3
    assert volume.segments[0].configuration.number == 3
