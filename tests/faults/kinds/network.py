"""Packets that do not arrive, or late, and volumes that are taken from who was cut off."""

import itertools
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

from tests.faults.bad_link import Conditions
from tests.faults.fault_cluster import FaultCluster
from tests.faults.kinds.fault import FRONT_END, healed, now_and_then

#: Each packet by itself, each way: so they overtake each other, and TCP takes some for lost.
_LATE: Final = Conditions(least_s=0.02, most_s=0.2)
#: The share that is lost at random, each way; and of those that are not, how many come twice.
_LOST: Final = (0.05, 0.2)
_REPEATED: Final = 0.02


def controls(cluster: FaultCluster) -> list[str]:
    return [each.name for each in cluster.controls]


@contextmanager
def node_unplugged(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    node = chance.choice(cluster.nodes).name
    with healed(cluster):
        cluster.network.unplug(node)
        yield node


@contextmanager
def one_way(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """What one sends the other does not arrive; the way back is fine."""
    pair = [FRONT_END, chance.choice(cluster.nodes).name]
    chance.shuffle(pair)
    with healed(cluster):
        cluster.network.drop(*pair)
        yield " -> ".join(pair)


@contextmanager
def node_cut_from_front_end(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """It is up, and everybody else says so."""
    node = chance.choice(cluster.nodes).name
    with healed(cluster):
        cluster.network.cut([FRONT_END], [node])
        yield f"{FRONT_END} | {node}"


@contextmanager
def front_end_sees_one(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """No quorum: guests wait."""
    nodes = [node.name for node in chance.sample(cluster.nodes, len(cluster.nodes) - 1)]
    with healed(cluster):
        cluster.network.cut([FRONT_END], nodes)
        yield f"{FRONT_END} | {', '.join(nodes)}"


@contextmanager
def cut_from_control(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Control takes them for down; guests' data goes on."""
    daemons = chance.sample([*cluster.nodes, cluster.front_ends[0], *cluster.snapshotds], chance.randint(1, 3))
    names = [each.name for each in daemons]
    with healed(cluster):
        cluster.network.cut(controls(cluster), names)
        yield f"control | {', '.join(names)}"


@contextmanager
def nodes_cut_from_each_other(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    with healed(cluster):
        for one, other in itertools.combinations([node.name for node in cluster.nodes], 2):
            cluster.network.cut([one], [other])
        yield " | ".join(node.name for node in cluster.nodes)


@contextmanager
def packets_lost(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """All packets between the front-end and a node are lost half of the time."""
    node = chance.choice(cluster.nodes).name
    network = cluster.network

    def restore() -> None:
        network.restore(FRONT_END, node)
        network.restore(node, FRONT_END)

    with healed(cluster), now_and_then(lambda: network.cut([FRONT_END], [node]), restore):
        yield f"{FRONT_END} - {node}"


def packets_delayed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """All that a node sends and gets; guests do not wait for it."""
    return _degraded(cluster, chance.choice(cluster.nodes).name, _LATE, chance)


def packets_dropped_at_random(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """Of all that a node sends and gets, and some arrive twice."""
    return _degraded(cluster, chance.choice(cluster.nodes).name, _some_lost(chance), chance)


def front_end_far_away(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """From its guests, the nodes and control: each packet takes as long as across an ocean."""
    return _degraded(cluster, FRONT_END, _LATE, chance)


def front_end_on_a_bad_line(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """A share of all that it sends and gets is lost, that of guests too."""
    return _degraded(cluster, FRONT_END, _some_lost(chance), chance)


def _some_lost(chance: random.Random) -> Conditions:
    return Conditions(lost=chance.uniform(*_LOST), repeated=_REPEATED)


@contextmanager
def _degraded(cluster: FaultCluster, machine: str, conditions: Conditions, chance: random.Random) -> Iterator[str]:
    with healed(cluster):
        cluster.network.degrade(machine, conditions, chance.getrandbits(32))
        yield f"{machine}: {conditions}"


@contextmanager
def taken_away(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The front-end is cut off from control and one node, and the volume attached elsewhere; then it goes back."""
    with healed(cluster):
        cluster.network.cut([FRONT_END], [*controls(cluster), chance.choice(cluster.nodes).name])
        cluster.attach(cluster.witnessed, 1, force=True)
        yield f"{cluster.witnessed} to front-end-1"
    cluster.attach(cluster.witnessed, 0, force=True)


@contextmanager
def cut_off_and_replaced(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The front-end and one node are alone, and its guests still ask it; others write at its successor and the rest."""
    nodes = [node.name for node in cluster.nodes]
    alone = nodes.pop(chance.randrange(len(nodes)))
    with healed(cluster):
        cluster.network.cut([FRONT_END, alone], [*controls(cluster), "front-end-1", *nodes])
        cluster.attach(cluster.witnessed, 1, force=True)
        yield f"{FRONT_END}, {alone} | front-end-1, {', '.join(nodes)}"
    cluster.attach(cluster.witnessed, 0, force=True)
