"""Snapshots as NBD exports of a real cluster: shipped ones and those that are on the nodes only, and clones of them."""

import asyncio
import dataclasses
import errno
import random
import subprocess
from pathlib import Path

import pytest

from blockstore.config import FrontEndSettings
from blockstore.rpc import snapshot_pb2
from blockstore.units import KIB, MIB
from nbd_server.wire import OptionReply, TransmissionFlag
from tests.cluster import CONTROL, Cluster
from tests.daemons import Daemon, wait_for
from tests.nbd_client import NbdClient, NbdError
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 16 * MIB
PIECE = 256 * KIB
LIMIT_S = 100
MISSING = "snap-" + "0" * 17
#: Two snapshots at once are enough, and 2 MiB of clones.
FRONT_END = FrontEndSettings(heartbeat_s=0.2, retry_limit_s=40.0, open_snapshots=2, clone_space_bytes=2 * MIB)


def run(work: object) -> None:
    asyncio.run(asyncio.wait_for(work, LIMIT_S))  # type: ignore[arg-type]


def server_of(cluster: Cluster) -> str:
    """The URI of the front-end, without an export's name."""
    return f"nbd://{cluster.front_ends[0].read_address('nbd_address')}/"


def log_of(cluster: Cluster) -> str:
    return cluster.front_ends[0].log.read_text()


def get(cluster: Cluster, snapshot: str) -> snapshot_pb2.Snapshot:
    found: snapshot_pb2.Snapshot = cluster.call("GetSnapshot", snapshot_pb2.GetSnapshotRequest(snapshot=snapshot))
    return found


def listed(cluster: Cluster) -> set[str]:
    return {each.id for each in cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest()).snapshots}


async def read_all(client: NbdClient) -> bytes:
    """All of it, many reads at once."""
    pieces = await asyncio.gather(*(client.read(offset, PIECE) for offset in range(0, client.size_bytes, PIECE)))
    return b"".join(pieces)


async def write_pieces(uri: str, model: bytearray, chance: random.Random, step: int) -> None:
    """Every second piece of `step`, and some bytes that begin and end in the middle of a block."""
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    for offset in range(0, SIZE, 2 * step):
        data = chance.randbytes(step)
        await client.write(offset, data)
        model[offset : offset + step] = data
    data = chance.randbytes(10_000)
    await client.write(12_345, data)
    model[12_345 : 12_345 + len(data)] = data
    await client.close()


async def refused(uri: str, kind: OptionReply) -> None:
    with pytest.raises(NbdError) as caught:
        await NbdClient.connect(uri)
    assert caught.value.errno == kind


def test_a_snapshot_is_read_by_its_name_and_kept_while_it_is_read(tmp_path: Path) -> None:
    require_programs("qemu-img", "nbdcopy")
    chance = random.Random(11)
    # A snapshot that was deleted goes where its reader is silent for a lease: longer than a busy machine holds one up.
    control = dataclasses.replace(CONTROL, lease_s=5.0)
    with Cluster(tmp_path, snapshotds=1, control_settings=control, front_end_settings=FRONT_END) as cluster:
        server, model = server_of(cluster), bytearray(SIZE)
        volume = cluster.create(SIZE, name="db")
        uri = cluster.attach(volume)
        run(write_pieces(uri, model, chance, PIECE))
        (snapshot,) = cluster.snapshot(volume)
        run(write_pieces(uri, bytearray(SIZE), chance, PIECE))
        wait_for("it to be exported", lambda: list(get(cluster, snapshot).uris) == [server + snapshot])
        run(check_stored(cluster, server, snapshot, bytes(model)))
        image = tmp_path / "content.img"
        image.write_bytes(model)
        compare(tmp_path, image, server + snapshot)
        run(check_clones(server, snapshot, model))
        assert not [each for each in (tmp_path / "front-end-0").iterdir() if each.stat().st_size > MIB]
        run(check_deletion(cluster, server, volume, snapshot, bytes(model)))
        assert cluster.volume(volume).epoch == 1


def compare(directory: Path, image: Path, uri: str) -> None:
    """By other people's clients, which read in parallel."""
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri], check=True, timeout=LIMIT_S)
    subprocess.run(["qemu-img", "convert", uri, "-O", "qcow2", directory / "c.qcow2"], check=True, timeout=LIMIT_S)
    subprocess.run(["qemu-img", "compare", image, directory / "c.qcow2"], check=True, timeout=LIMIT_S)
    subprocess.run(["nbdcopy", uri, directory / "copy.img"], check=True, timeout=LIMIT_S)
    assert (directory / "copy.img").read_bytes() == image.read_bytes()
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri + "+rw"], check=True, timeout=LIMIT_S)


async def started(daemon: Daemon) -> None:
    """By this thread: the process ends with the thread that it was started by."""
    daemon.start()
    await asyncio.to_thread(daemon.read_address)


async def check_stored(cluster: Cluster, server: str, snapshot: str, model: bytes) -> None:
    client = await NbdClient.connect(server + snapshot)
    assert client.size_bytes == SIZE
    assert client.flags & TransmissionFlag.READ_ONLY
    assert client.flags & TransmissionFlag.CAN_MULTI_CONN
    assert await client.read(12_344, 10_001) == model[12_344:22_345]
    with pytest.raises(NbdError) as caught:
        await client.write(0, b"x")
    assert caught.value.errno == errno.EPERM
    await client.close()
    for name in (
        "snap-",
        "snap-x+rw",
        "+rw",
        f"{snapshot}+",
        f"{snapshot}+rw+rw",
        f"{snapshot}+ro",
        "snäp",
        snapshot[:-1],
    ):
        await refused(server + name, OptionReply.ERR_UNKNOWN)
    await refused(server + MISSING, OptionReply.ERR_UNKNOWN)
    # Killed while it is read: what is on its way waits.
    client = await NbdClient.connect(server + snapshot)
    cluster.snapshotds[0].kill()
    reading = asyncio.create_task(read_all(client))
    await started(cluster.snapshotds[0])  # at another port
    assert await reading == model
    await client.close()


async def check_clones(server: str, snapshot: str, model: bytearray) -> None:
    """Each connection has its own; together they may hold so much."""
    one, other = [await NbdClient.connect(f"{server}{snapshot}+rw") for _ in range(2)]
    assert not one.flags & (TransmissionFlag.READ_ONLY | TransmissionFlag.CAN_MULTI_CONN)
    changed = bytearray(model)
    for offset, length in ((5000, 3), (4 * KIB, 64 * KIB), (MIB - 100, 200)):
        data = random.Random(offset).randbytes(length)
        await one.write(offset, data)
        changed[offset : offset + length] = data
    await one.trim(8 * KIB, 16 * KIB)
    await one.write_zeroes(2 * MIB, MIB)
    changed[8 * KIB : 24 * KIB] = bytes(16 * KIB)
    changed[2 * MIB : 3 * MIB] = bytes(MIB)
    await one.flush()
    assert await read_all(one) == changed
    assert await read_all(other) == model
    with pytest.raises(NbdError) as caught:
        await other.write(0, bytes(2 * MIB))
    assert caught.value.errno == errno.ENOSPC
    await one.close()
    await until_written(other, bytes(2 * MIB))
    await other.close()
    again = await NbdClient.connect(f"{server}{snapshot}+rw")
    assert await read_all(again) == model
    await again.close()


async def until_written(client: NbdClient, data: bytes) -> None:
    """Once the other's space is given back."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await client.write(0, data)
                return
            except NbdError as error:
                if error.errno != errno.ENOSPC:
                    raise
            await asyncio.sleep(0.05)


async def check_deletion(cluster: Cluster, server: str, volume: str, snapshot: str, model: bytes) -> None:
    """It is kept for those who have it, refused to others, and gone after them."""
    client = await NbdClient.connect(server + snapshot)
    await asyncio.to_thread(delete, cluster, snapshot)
    # Longer than a lease, over a restart of control, and with a daemon that has nothing in memory.
    cluster.control.kill()
    await started(cluster.control)
    cluster.snapshotds[0].kill()
    await started(cluster.snapshotds[0])
    (later,) = await asyncio.to_thread(cluster.snapshot, volume)
    await (await NbdClient.connect(server + later)).close()
    await asyncio.to_thread(delete, cluster, later)
    await asyncio.to_thread(wait_for, "one that was read later is gone", lambda: later not in listed(cluster))
    assert snapshot in await asyncio.to_thread(listed, cluster)
    assert await read_all(client) == model
    await client.close()
    await asyncio.to_thread(wait_for, "the snapshot is gone", lambda: snapshot not in listed(cluster))
    await refused(server + snapshot, OptionReply.ERR_UNKNOWN)


def delete(cluster: Cluster, snapshot: str) -> None:
    cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot))


def test_one_that_is_on_the_nodes_only_is_read_from_there_and_goes_on_when_it_is_shipped(tmp_path: Path) -> None:
    chance = random.Random(12)
    with Cluster(tmp_path, snapshotds=1, front_end_settings=FRONT_END) as cluster:
        server, model = server_of(cluster), bytearray(SIZE)
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        run(write_pieces(uri, model, chance, PIECE))
        cluster.snapshotds[0].kill()
        (snapshot,) = cluster.snapshot(volume, wait=False)
        run(write_pieces(uri, bytearray(SIZE), chance, PIECE))
        run(check_sealed(cluster, server, snapshot, volume, bytes(model)))


async def check_sealed(cluster: Cluster, server: str, snapshot: str, volume: str, model: bytes) -> None:
    reader, clone = [await NbdClient.connect(server + name) for name in (snapshot, snapshot + "+rw")]
    assert await read_all(reader) == model
    await clone.write(0, b"changed")
    cluster.nodes[0].kill()
    await started(cluster.snapshotds[0])

    def is_completed() -> bool:
        return get(cluster, snapshot).state == snapshot_pb2.SNAPSHOT_STATE_COMPLETED

    await asyncio.to_thread(wait_for, "the snapshot is completed", is_completed)
    # All that the nodes had of it goes: its volume.
    await asyncio.to_thread(cluster.detach, volume)
    for node in cluster.nodes:
        node.kill()
    assert await read_all(reader) == model
    assert await read_all(clone) == b"changed" + model[7:]
    assert "is read from the object store from now on" in log_of(cluster)
    await reader.close()
    await clone.close()
