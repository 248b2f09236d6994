"""A volume restored in a real cluster: read, written and trimmed while it hydrates and its processes are killed."""

import asyncio
import random
from pathlib import Path

import pytest

from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import KIB, MIB
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.nbd_client import NbdClient

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 16 * MIB
LARGER = 24 * MIB
PIECE = 256 * KIB
LIMIT_S = 120


async def write(uri: str, pieces: dict[int, bytes]) -> None:
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    for offset, data in pieces.items():
        await client.write(offset, data)
    await client.close()


async def check(uri: str, model: bytearray, first: int = 0, last: int = LARGER) -> None:
    """These bytes, all at once in reads of 256 KiB."""
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    offsets = range(first, last, PIECE)
    shown = await asyncio.gather(*(client.read(offset, PIECE) for offset in offsets))
    for offset, data in zip(offsets, shown, strict=True):
        assert data == model[offset : offset + PIECE], f"{PIECE} bytes at {offset}"
    await client.close()


async def change(uri: str, model: bytearray, chance: random.Random) -> None:
    """Whole blocks, parts of blocks, and trims."""
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    for _ in range(20):
        offset, length = chance.randrange(LARGER - 64 * KIB), chance.randrange(1, 64 * KIB)
        data = chance.randbytes(length)
        await client.write(offset, data)
        model[offset : offset + length] = data
        offset = chance.randrange(LARGER // KIB // 4 - 64) * 4 * KIB
        await client.write_zeroes(offset, 64 * KIB)
        model[offset : offset + 64 * KIB] = bytes(64 * KIB)
    await client.close()


def run(work: object) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))  # type: ignore[arg-type]


def restore(cluster: Cluster, snapshot: str, rate_bytes: int = 16 * KIB) -> str:
    """A larger volume made from it, which hydrates slowly."""
    request = control_pb2.CreateVolumeRequest(size_bytes=LARGER, snapshot=snapshot, init_rate_bytes=rate_bytes)
    volume = str(cluster.call("CreateVolume", request).id)
    wait_for(
        f"{volume} to be available",
        lambda: cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE,
    )
    return volume


def test_it_shows_the_snapshot_and_its_guests_changes_whatever_is_killed(tmp_path: Path) -> None:
    chance = random.Random(7)
    with Cluster(tmp_path, snapshotds=1) as cluster:
        original = cluster.create(SIZE)
        pieces = {offset: chance.randbytes(PIECE) for offset in range(0, SIZE, 2 * PIECE)}
        model = bytearray(LARGER)
        for offset, data in pieces.items():
            model[offset : offset + PIECE] = data
        uri = cluster.attach(original)
        run(write(uri, pieces))
        (snapshot,) = cluster.snapshot(original)
        run(write(uri, {0: bytes(SIZE)}))

        volume = restore(cluster, snapshot)
        uri = cluster.attach(volume)
        run(check(uri, model, 0, 4 * MIB))
        run(change(uri, model, chance))
        run(check(uri, model, 2 * MIB, 6 * MIB))

        cluster.front_ends[0].kill()
        cluster.start(cluster.front_ends[0])
        uri = cluster.uri(volume)
        run(change(uri, model, chance))
        cluster.nodes[1].kill()
        cluster.snapshotds[0].kill()
        cluster.start(cluster.snapshotds[0])
        run(check(uri, model, 4 * MIB, 8 * MIB))
        cluster.start(cluster.nodes[1])

        cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=volume, rate_bytes=0))
        wait_for("it is hydrated", lambda: not cluster.volume(volume).HasField("source"))
        cluster.snapshotds[0].kill()
        run(check(uri, model))
        cluster.detach(volume)
        run(check(cluster.attach(volume), model))


def test_one_that_nobody_attaches_hydrates_and_several_are_snapshotted_at_one_instant(tmp_path: Path) -> None:
    """Under maintenance: no export, and the snapshots of a barrier over an attached and a detached volume are whole."""
    chance = random.Random(8)
    with Cluster(tmp_path, snapshotds=1) as cluster:
        attached, detached = cluster.create(SIZE), cluster.create(SIZE)
        data = chance.randbytes(MIB)
        run(write(cluster.attach(attached), {0: data}))
        both = cluster.snapshot(attached, detached)
        assert len(both) == 2
        volume = restore(cluster, both[0], rate_bytes=0)
        wait_for("it is hydrated", lambda: not cluster.volume(volume).HasField("source"))
        cluster.snapshotds[0].kill()
        run(check(cluster.attach(volume), bytearray(data).ljust(LARGER, b"\0")))
