"""The nodes' disk fills up: writes get ENOSPC, reads go on, nothing acknowledged is lost, room ends it."""

import asyncio
import dataclasses
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import NODE, Cluster
from tests.crash.model import SECTOR_SIZE, Model
from tests.crash.offline import assert_replicas_agree
from tests.crash.small_disk import SmallDisk
from tests.daemons import wait_for
from tests.nbd_client import NbdClient, NbdError

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

#: All three nodes share the disk: journals, ballast and three copies of what is written.
DISK = 1536 * MIB
#: Room for all that each node takes beyond what it had: its ballast, two more journal files, which it keeps once it
#: has them, and tables that grow. Less, and all of them may stay short of it, by a few megabytes.
FILLER = 704 * MIB
VOLUME = 512 * MIB
CHUNK = MIB
CHUNK_SECTORS = CHUNK // SECTOR_SIZE
LIMIT_S = 120


async def write_chunk(client: NbdClient, model: Model, sector: int) -> bool:
    """False where there is no room. Raises NbdError for other errors."""
    version = model.next_version()
    try:
        await client.write(sector * SECTOR_SIZE, model.content(version, sector, CHUNK_SECTORS))
    except NbdError as error:
        if error.errno != errno.ENOSPC:
            raise
        model.unknown(version, sector, CHUNK_SECTORS)
        return False
    model.acknowledged(version, sector, CHUNK_SECTORS)
    return True


async def fill(uri: str, model: Model) -> int:
    """Write from the start until there is no room; the chunks that were acknowledged."""
    client = await NbdClient.connect(uri)
    for chunk in range(VOLUME // CHUNK):
        if not await write_chunk(client, model, chunk * CHUNK_SECTORS):
            await client.close()
            return chunk
    raise AssertionError(f"{VOLUME} bytes fit a disk that is too small for them")


async def check_all(uri: str, model: Model, chunks: int) -> None:
    """All that was acknowledged can be read, and is right."""
    client = await NbdClient.connect(uri)
    for chunk in range(chunks + 1):
        model.check(chunk * CHUNK_SECTORS, await client.read(chunk * CHUNK, CHUNK))
    await client.close()


async def write_until_room(uri: str, model: Model, chunk: int) -> None:
    """A refused write is tried again, as a guest's file system would."""
    client = await NbdClient.connect(uri)
    while not await write_chunk(client, model, chunk * CHUNK_SECTORS):  # noqa: ASYNC110 (the server tells by the answer)
        await asyncio.sleep(0.1)
    await client.close()


def run(step: Callable[..., Awaitable[object]], *arguments: object) -> object:
    return asyncio.run(asyncio.wait_for(step(*arguments), LIMIT_S))


def says(cluster: Cluster, *texts: str) -> bool:
    """All of them, in one status."""
    messages = [problem.message for problem in cluster.status().problems]
    return all(any(text in message for message in messages) for text in texts)


def test_a_full_disk(tmp_path: Path) -> None:
    settings = dataclasses.replace(NODE, reserve_bytes=64 * MIB, checkpoint_s=0.5)
    model = Model(0, VOLUME // SECTOR_SIZE)
    with (
        SmallDisk(tmp_path, DISK, FILLER) as disk,
        Cluster(tmp_path, node_settings=settings, node_directory=disk.path) as cluster,
    ):
        volume = cluster.create(VOLUME)
        uri = cluster.attach(volume)
        chunks = asyncio.run(asyncio.wait_for(fill(uri, model), LIMIT_S))
        assert chunks > 8, "full before anything was written"
        run(check_all, uri, model, chunks)
        told = "wait or fail with ENOSPC (full: node-", "full: free space on its disk"
        wait_for("the status to say what to do", lambda: says(cluster, *told))

        for node in cluster.nodes:
            node.kill()
        cluster.start(*cluster.nodes)
        run(check_all, uri, model, chunks)

        disk.make_room()
        run(write_until_room, uri, model, chunks)
        run(check_all, uri, model, chunks)
        wait_for("the status to say no more of it", lambda: not says(cluster, "ENOSPC"))
        assert_replicas_agree(cluster, volume)
