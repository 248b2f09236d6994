"""What is made large, each in a cluster of its own: a volume, a chain of snapshots, the number of volumes.

Each case leaves one volume to be probed, with the same data and at least as many snapshots as the small cluster's has.
"""

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import BLOCK_SIZE, GIB, KIB, MIB
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.nbd_client import NbdClient

#: Of every probed volume, and what of it is written: what is read was written, and is small enough to be hot.
SMALL_BYTES: Final = GIB
DATA_BYTES: Final = 16 * MIB
#: Snapshots that are made before all of them have to be in the object store.
_SHIPPED_TOGETHER: Final = 50
#: Requests for volumes in flight.
_CREATING: Final = 8
_LIMIT_S: Final = 1800.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """A cluster, and the volume in it that is probed."""

    cluster: Cluster
    volume: str

    def uri(self) -> str:
        """Of the volume, while it is attached."""
        return self.cluster.uri(self.volume)


def make_side(cluster: Cluster, size_bytes: int, snapshots: int, say: Say) -> Side:
    """A volume of that size with the data of all of them, attached, and so many snapshots of it that are shipped."""
    side = Side(cluster, cluster.create(size_bytes))
    cluster.attach(side.volume)
    asyncio.run(_write_all(side))
    for first in range(0, snapshots, _SHIPPED_TOGETHER):
        count = min(_SHIPPED_TOGETHER, snapshots - first)
        asyncio.run(_add_snapshots(side, count))
        wait_shipped(side, count)
        say(f"{first + count} of {snapshots} snapshots")
    return side


def add_volumes(cluster: Cluster, count: int, say: Say) -> None:
    """So many volumes of the small size that nobody has attached, each with a replica on every node."""
    with ThreadPoolExecutor(_CREATING) as threads:
        request = control_pb2.CreateVolumeRequest(size_bytes=SMALL_BYTES)
        for made, _ in enumerate(threads.map(lambda _: cluster.call("CreateVolume", request), range(count)), 1):
            if made % 100 == 0 or made == count:
                say(f"{made} of {count} volumes")
    wait_for("all volumes to be there", lambda: not _being_created(cluster), _LIMIT_S)


def wait_shipped(side: Side, count: int) -> None:
    """Until the newest `count` snapshots of the volume are whole in the object store."""
    request = snapshot_pb2.ListSnapshotsRequest(volume=side.volume, limit=count)

    def shipped() -> bool:
        found = side.cluster.call("ListSnapshots", request).snapshots
        states = {each.state for each in found}
        if snapshot_pb2.SNAPSHOT_STATE_ERROR in states:
            raise RuntimeError(f"a snapshot of {side.volume} failed: {[each.reason for each in found]}")
        return len(found) == count and states == {snapshot_pb2.SNAPSHOT_STATE_COMPLETED}

    wait_for(f"{count} snapshots of {side.volume} to be shipped", shipped, _LIMIT_S)


async def _write_all(side: Side) -> None:
    client = await NbdClient.connect(side.uri())
    for offset in range(0, DATA_BYTES, 256 * KIB):
        await client.write(offset, random.Random(offset).randbytes(256 * KIB))
    await client.close()


async def _add_snapshots(side: Side, count: int) -> None:
    """Each after a block was written, so that it has something to ship and a generation of its own."""
    client = await NbdClient.connect(side.uri())
    for _ in range(count):
        offset = random.randrange(DATA_BYTES // BLOCK_SIZE) * BLOCK_SIZE
        await client.write(offset, random.randbytes(BLOCK_SIZE))
        side.cluster.snapshot(side.volume, wait=False)
    await client.close()


def _being_created(cluster: Cluster) -> bool:
    found = cluster.call("ListVolumes", control_pb2.ListVolumesRequest()).volumes
    return any(each.state == control_pb2.VOLUME_STATE_CREATING for each in found)
