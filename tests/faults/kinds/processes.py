"""Nodes, front-ends and snapshotd that are killed, stopped, or slow."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from tests.faults.fault_cluster import FaultCluster
from tests.faults.kinds.fault import FRONT_END, complete_and_delete, killed, now_and_then, paused_now


def node_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return killed(cluster, [chance.choice(cluster.nodes)])


def all_nodes_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return killed(cluster, cluster.nodes)


@contextmanager
def front_end_restarted(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """At once, as a supervisor would."""
    cluster.front_ends[0].kill()
    cluster.start(cluster.front_ends[0])
    yield FRONT_END


@contextmanager
def everything_restarted(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    for daemon in (*cluster.daemons, *cluster.stores):
        daemon.kill()
    if cluster.etcd:
        cluster.etcd.start()
    cluster.start(*cluster.daemons)
    yield "all"


@contextmanager
def snapshotd_killed(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """While it ships a snapshot, which is completed afterwards."""
    (snapshot,) = cluster.snapshot(cluster.witnessed, wait=False)
    with killed(cluster, cluster.snapshotds) as who:
        yield who
    complete_and_delete(cluster, snapshot)


def paused(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """Any process of all, those of etcd too."""
    return paused_now(chance.choice([*cluster.daemons, *cluster.stores]))


@contextmanager
def node_stutters(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """It stops half of the time: it answers late, and is never away."""
    daemon = chance.choice(cluster.nodes)
    with now_and_then(daemon.pause, daemon.resume):
        yield daemon.name
