"""Disks that are full or slow, and clocks that jump."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tests.daemons import wait_for
from tests.faults.fault_cluster import FaultCluster

_HOUR_NS: Final = 3_600_000_000_000


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
    """By hours, there and back."""
    name = chance.choice(sorted(cluster.steering))
    hours = chance.choice([-30, -1, 1, 30])
    cluster.steering[name].set(clock_offset_ns=hours * _HOUR_NS)
    try:
        yield f"{name} by {hours} h"
    finally:
        cluster.steering[name].set(clock_offset_ns=0)
