"""Disks that are full or slow, and clocks that jump."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from tests.daemons import wait_for
from tests.faults.fault_cluster import FaultCluster

_HOUR_NS: Final = 3_600_000_000_000
_HOURS: Final = (-30, -1, 1, 30)


@contextmanager
def disk_full(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    cluster.fill_disk()
    try:
        wait_for("control to hear of a full node", lambda: any(node.full for node in cluster.status().nodes))
        yield "node-0"
    finally:
        cluster.make_room()


@contextmanager
def disk_slow(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Each sync takes a fifth of a second."""
    node = chance.choice(cluster.nodes).name
    cluster.steering[node].set(sync_least_us=200_000, sync_most_us=200_000)
    try:
        yield node
    finally:
        cluster.steering[node].set(sync_least_us=0, sync_most_us=0)


@contextmanager
def clock_jumps(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Of any process, by hours, there and back."""
    with _clocks_moved(cluster, [chance.choice(sorted(cluster.steering))], chance) as who:
        yield who


@contextmanager
def clocks_of_control_jump(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """Of all controls and all members of etcd, each by hours of its own."""
    names = [each.name for each in (*cluster.controls, *cluster.stores)]
    with _clocks_moved(cluster, names, chance) as who:
        yield who


@contextmanager
def _clocks_moved(cluster: FaultCluster, names: Sequence[str], chance: random.Random) -> Iterator[str]:
    hours = {name: chance.choice(_HOURS) for name in names}
    for name in names:
        cluster.steering[name].set(clock_offset_ns=hours[name] * _HOUR_NS)
    try:
        yield ", ".join(f"{name} by {hours[name]} h" for name in names)
    finally:
        for name in names:
            cluster.steering[name].set(clock_offset_ns=0)
