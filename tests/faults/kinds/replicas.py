"""Replicas that move, and nodes that come back as somebody else: with an old disk, or at another one's address."""

import random
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blockstore.rpc import control_pb2
from tests.daemons import Daemon, wait_for
from tests.faults.fault_cluster import SMALL, FaultCluster
from tests.faults.kinds.fault import insist, killed

#: After which a node that is away is replaced, while `node_replaced` lasts.
_REPLACE_AFTER_S: Final = 1.0
_MOVED_LIMIT_S: Final = 90.0


@contextmanager
def node_drained(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """All its replicas move elsewhere; then others may come."""
    node = some_node(cluster, chance)
    drain(cluster, node)
    yield node
    wait_for(f"{node} to be empty", lambda: empty(cluster, node), _MOVED_LIMIT_S)
    undrain(cluster, node)


@contextmanager
def node_replaced(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """It is away so long that its replicas are made anew on others, and what it has is discarded when it is back."""
    node = some_node(cluster, chance)
    before = cluster.call("GetRepair", control_pb2.GetRepairRequest()).replace_after_s
    daemon = next(each for each in cluster.nodes if each.read_address() == _addresses(cluster)[node])
    with killed(cluster, [daemon]) as who:
        _replace_after(cluster, _REPLACE_AFTER_S)
        wait_for(f"{node} to be replaced", lambda: empty(cluster, node), _MOVED_LIMIT_S)
        _replace_after(cluster, before)
        yield who
    _rebalance(cluster)


@contextmanager
def old_copy_put_back(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """A node is started with what its disk had some seconds before."""
    node = chance.choice([each for index, each in enumerate(cluster.nodes) if index != SMALL])
    old = cluster.directory / "old-copy"
    with killed(cluster, [node]):
        _copy(node.directory, old)
    cluster.wait_whole(cluster.witnessed)
    yield node.name
    with killed(cluster, [node]):
        _copy(old, node.directory)


@contextmanager
def addresses_swapped(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Two nodes change places: each listens where the other one did, and then on its own machine again."""
    one, other = chance.sample(cluster.nodes, 2)
    commands = {node: node.command for node in (one, other)}
    there = {one: _command_at(cluster, one, other), other: _command_at(cluster, other, one)}
    _restart(cluster, there)
    yield f"{one.name}, {other.name}"
    _restart(cluster, commands)


# ---- what they are made of


def some_node(cluster: FaultCluster, chance: random.Random) -> str:
    """The id of one that is up, and has replicas of the volume."""
    up = {each.id for each in cluster.status().nodes if each.up}
    held = {each.node for each in cluster.health(cluster.witnessed).replicas}
    return chance.choice(sorted(up & held))


def drain(cluster: FaultCluster, node: str) -> None:
    insist(lambda: cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=node)))


def undrain(cluster: FaultCluster, node: str) -> None:
    """Take it back, and let others move there."""
    insist(lambda: cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=node, undo=True)))
    _rebalance(cluster)


def empty(cluster: FaultCluster, node: str) -> bool:
    """Whether no volume has a member or a newcomer there, and none is on its way from there."""
    for volume in (cluster.witnessed, cluster.spare):
        for segment in cluster.volume(volume).segments:
            now = segment.configuration
            if any(each.node == node for each in (*now.members, *now.old_members, now.replacement.newcomer)):
                return False
    return True


def _rebalance(cluster: FaultCluster) -> None:
    """Begun only: the next faults come while replicas move."""
    insist(lambda: cluster.call("Rebalance", control_pb2.RebalanceRequest()))


def _replace_after(cluster: FaultCluster, seconds: float) -> None:
    insist(lambda: cluster.call("SetRepair", control_pb2.SetRepairRequest(replace_after_s=seconds)))


def _addresses(cluster: FaultCluster) -> dict[str, str]:
    return {each.id: each.address for each in cluster.status().nodes}


def _copy(source: Path, target: Path) -> None:
    """In place of what is there, with its holes."""
    subprocess.run(["rm", "-rf", target], check=True, timeout=60)
    subprocess.run(["cp", "-a", "--sparse=always", source, target], check=True, timeout=60)


def _command_at(cluster: FaultCluster, node: Daemon, other: Daemon) -> list[str | Path]:
    """To run the node where the other one is."""
    here, there = cluster.network.prefix(node.name), cluster.network.prefix(other.name)
    return [*there, *node.command[len(here) :], "--listen", other.read_address()]


def _restart(cluster: FaultCluster, commands: Mapping[Daemon, list[str | Path]]) -> None:
    for node, command in commands.items():
        node.kill()
        node.command = command
    cluster.start(*commands)
