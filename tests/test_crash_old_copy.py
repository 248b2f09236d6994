"""Disks that were put back from old copies: what they acknowledged and no longer have is noticed.

One is mended from the others. Where all are old, nobody has what was acknowledged: the volume is in
error until an operator accepts the loss, and then serves what the copies hold.
"""

import asyncio
import shutil
from pathlib import Path

import pytest

from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import wait_for
from tests.nbd_client import NbdClient

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 32 * MIB
SECTORS = range(SIZE // SECTOR_SIZE)
PROGRESS = 200


def test_an_old_copy_put_back_is_filled_again(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        cluster.attach(volume)
        node = cluster.nodes[0]
        with Workload(lambda: cluster.uri_now(volume), SECTORS) as load:
            load.wait_progress(PROGRESS)
            node.kill()
            shutil.copytree(node.directory, tmp_path / "old")
            cluster.start(node)
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
            # The front-end goes as well, so that nobody who saw the acknowledgements lives on but in the metastore.
            node.kill()
            cluster.front_ends[0].kill()
            shutil.rmtree(node.directory)
            shutil.copytree(tmp_path / "old", node.directory)
            cluster.start(node, *cluster.front_ends)
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
        load.verify(cluster.uri(volume))
        assert_replicas_agree(cluster, volume)


def test_old_copies_of_all_nodes_are_served_only_once_the_loss_is_accepted(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        write(cluster.attach(volume), b"copied")
        put_back_later = [(node, tmp_path / f"old-{node.name}") for node in cluster.nodes]
        for node, old in put_back_later:
            node.kill()
            shutil.copytree(node.directory, old)
        cluster.start(*cluster.nodes)
        write(cluster.uri(volume), b"gone since")
        cluster.wait_whole(volume, idle=True)  # control has heard of it by then
        cluster.front_ends[0].kill()
        for node, old in put_back_later:
            node.kill()
            shutil.rmtree(node.directory)
            shutil.copytree(old, node.directory)
        cluster.start(*cluster.nodes, *cluster.front_ends)
        wait_for(f"{volume} to be in error", lambda: cluster.volume(volume).state == control_pb2.VOLUME_STATE_ERROR)
        assert "--accept-loss" in cluster.volume(volume).reason
        recover = control_pb2.AttachVolumeRequest(volume=volume, force=True, accept_loss=True)
        cluster.call("AttachVolume", recover)
        cluster.wait_whole(volume, idle=True)
        assert read(cluster.uri(volume)) == b"copied"
        write(cluster.uri(volume), b"and on")
        assert read(cluster.uri(volume)) == b"and on"
        assert_replicas_agree(cluster, volume)


def write(uri: str, text: bytes) -> None:
    """The text, then zeroes, at the start of the volume."""

    async def run() -> None:
        client = await NbdClient.connect(uri)
        await client.write(0, text.ljust(SECTOR_SIZE, b"\0"))
        await client.close()

    asyncio.run(run())


def read(uri: str) -> bytes:
    """What `write` wrote last."""

    async def run() -> bytes:
        client = await NbdClient.connect(uri)
        data = await client.read(0, SECTOR_SIZE)
        await client.close()
        return data.rstrip(b"\0")

    return asyncio.run(run())
