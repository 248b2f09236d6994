"""A front-end that slept while its volume went elsewhere: the first write that it hears is refused, and said so."""

import asyncio
import errno
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import Cluster
from tests.crash.offline import assert_replicas_agree
from tests.nbd_client import Disconnected, NbdClient, NbdError

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

OLD, NEW = b"old" * 2048, b"new" * 2048
LIMIT_S = 120


async def paused_elsewhere_resumed(cluster: Cluster, volume: str) -> None:
    """The story; control sleeps while the old front-end wakes up, so only the nodes can tell it."""
    uri = await asyncio.to_thread(cluster.attach, volume, 0)
    old, link = await NbdClient.connect(uri), await NbdClient.connect(uri + "@host-1")
    await old.write(0, OLD)
    cluster.front_ends[0].pause()
    late_write, late_read = (asyncio.create_task(each) for each in (old.write(0, OLD), old.read(0, len(OLD))))
    late_link = asyncio.create_task(link.write(0, OLD))
    elsewhere = await asyncio.to_thread(cluster.attach, volume, 1, force=True)
    new = await NbdClient.connect(elsewhere)
    assert await new.read(0, len(OLD)) == OLD
    await new.write(0, NEW)
    cluster.control.pause()
    cluster.front_ends[0].resume()
    with pytest.raises(NbdError) as refused:
        await late_write
    assert refused.value.errno == errno.ESHUTDOWN
    with pytest.raises((NbdError, Disconnected)):
        await late_read
    # What a kernel has for a file system: no error that would look like a broken disk, and nothing acknowledged.
    with pytest.raises(Disconnected):
        await late_link
    with pytest.raises((NbdError, Disconnected)):
        await old.write(0, OLD)
    assert await new.read(0, len(NEW)) == NEW
    cluster.control.resume()
    for each in (old, link, new):
        await each.close()


def test_an_old_front_end_is_fenced(tmp_path: Path) -> None:
    with Cluster(tmp_path, front_ends=2) as cluster:
        volume = cluster.create(16 * MIB)
        asyncio.run(asyncio.wait_for(paused_elsewhere_resumed(cluster, volume), LIMIT_S))
        assert_replicas_agree(cluster, volume)
