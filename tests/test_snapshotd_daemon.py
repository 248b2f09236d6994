"""The whole daemon in a cluster of processes: guests write, snapshots ship, daemons die in the middle."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from blockstore.rpc import snapshot_pb2 as pb
from blockstore.rpc import snapshot_pb2_grpc
from blockstore.units import BLOCK_SIZE, MIB
from snapshotd.crypto import SALT_SIZE
from snapshotd.keyring import FileKeyring
from snapshotd.layout import quarantine_key
from snapshotd.local_store import LocalStore
from snapshotd.pack_index import PackIndex
from snapshotd.quarantine import encode_quarantine
from snapshotd.repository import Repository, open_repository
from tests.cluster import KEYRING, SNAPSHOTD, Cluster
from tests.daemons import wait_for
from tests.nbd_client import NbdClient

Content = dict[int, bytes]
VOLUME_SIZE = 64 * MIB
BLOCKS = VOLUME_SIZE // BLOCK_SIZE


def noise(seed: int, count: int) -> Content:
    """`count` blocks at random places, which do not compress."""
    chance = Random(seed)
    return {number: chance.randbytes(BLOCK_SIZE) for number in chance.sample(range(BLOCKS), count)}


def write(uri: str, content: Content) -> None:
    async def run() -> None:
        client = await NbdClient.connect(uri)
        await asyncio.gather(*(client.write(number * BLOCK_SIZE, each) for number, each in content.items()))
        await client.close()

    asyncio.run(run())


def found(cluster: Cluster, snapshot: str) -> pb.Snapshot:
    answer: pb.Snapshot = cluster.call("GetSnapshot", pb.GetSnapshotRequest(snapshot=snapshot))
    return answer


def completed(cluster: Cluster, snapshot: str) -> pb.Snapshot:
    """Wait for it."""

    def is_completed() -> pb.Snapshot | None:
        now = found(cluster, snapshot)
        assert now.state != pb.SNAPSHOT_STATE_ERROR, now.reason
        return now if now.state == pb.SNAPSHOT_STATE_COMPLETED else None

    return wait_for(f"{snapshot} to be completed", is_completed)


@contextmanager
def store_of(cluster: Cluster, index: int = 0) -> Iterator[snapshot_pb2_grpc.SnapshotStoreStub]:
    with grpc.insecure_channel(cluster.snapshotds[index].read_address()) as channel:
        yield snapshot_pb2_grpc.SnapshotStoreStub(channel)


def content_of(cluster: Cluster, snapshot: pb.Snapshot, index: int = 0) -> Content:
    """All that it maps, as the daemon serves it."""
    shown: Content = {}
    with store_of(cluster, index) as stub:
        mapped_blocks = stub.MapShard(pb.MapShardRequest(snapshot=snapshot.id, root=snapshot.root, shard=0)).mapped
        for start in range(0, BLOCKS, 256):
            request = pb.FetchRequest(snapshot=snapshot.id, root=snapshot.root, start=start, count=256)
            answer = stub.Fetch(request)
            assert answer.mapped == (mapped_blocks or bytes(4096))[start // 8 : start // 8 + 32]
            numbers = [start + at for at in range(256) if answer.mapped[at >> 3] >> (at & 7) & 1]
            for at, number in enumerate(numbers):
                shown[number] = answer.payload[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]
    return shown


def stored_bytes(cluster: Cluster, folder: str) -> int:
    """Of all objects in a folder of the store."""
    directory = cluster.directory / "store" / folder
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) if directory.exists() else 0


def test_snapshots_ship_only_what_changed(tmp_path: Path) -> None:
    with Cluster(tmp_path, snapshotds=1) as cluster:
        volume = cluster.create(VOLUME_SIZE)
        uri = cluster.attach(volume)
        content = noise(1, 1500)
        write(uri, content)
        first = completed(cluster, cluster.snapshot(volume)[0])
        assert first.statistics.logical_bytes == first.statistics.changed_bytes == 1500 * BLOCK_SIZE
        changes = noise(2, 30) | dict.fromkeys(list(content)[:5], bytes(BLOCK_SIZE))
        write(uri, changes)
        second = completed(cluster, cluster.snapshot(volume)[0])
        assert second.parent == first.id
        assert second.statistics.changed_bytes == 35 * BLOCK_SIZE
        assert second.statistics.stored_bytes < 30 * BLOCK_SIZE * 1.1
        assert content_of(cluster, first) == content
        now = content | changes
        assert content_of(cluster, second) == {number: each for number, each in now.items() if any(each)}
        for snapshot in (first, second):
            cluster.call("DeleteSnapshot", pb.DeleteSnapshotRequest(snapshot=snapshot.id))
        wait_for("the roots to be gone", lambda: not os.listdir(tmp_path / "store" / "snapshots"))
        cluster.stop()


def test_a_daemon_that_is_killed_goes_on_and_uploads_nothing_twice(tmp_path: Path) -> None:
    # Of 51 MiB; who was not run for some seconds must still find the second kill to be in the middle.
    slow = dataclasses.replace(SNAPSHOTD, upload_rate_bytes=6 * MIB)
    with Cluster(tmp_path, snapshotds=1, snapshotd_settings=slow) as cluster:
        daemon = cluster.snapshotds[0]
        volume = cluster.create(VOLUME_SIZE)
        uri = cluster.attach(volume)
        content = noise(3, 13_000)
        write(uri, content)
        (snapshot,) = cluster.snapshot(volume, wait=False)
        for packs in (1, 2):
            wait_for(f"pack {packs}", lambda packs=packs: stored_bytes(cluster, "packs") > packs * 14 * MIB)  # type: ignore[misc]
            daemon.kill()
            assert found(cluster, snapshot).state == pb.SNAPSHOT_STATE_PENDING
            if packs == 2:
                daemon.command += ["--upload-rate", "0"]
            cluster.start(daemon)
        shipped = completed(cluster, snapshot)
        assert content_of(cluster, shipped) == content
        assert 13_000 * BLOCK_SIZE < stored_bytes(cluster, "packs") < 13_000 * BLOCK_SIZE * 1.02
        cluster.stop()


def test_two_daemons_share_the_work_and_the_blocks(tmp_path: Path) -> None:
    with Cluster(tmp_path, snapshotds=2) as cluster:
        volumes = [cluster.create(VOLUME_SIZE) for _ in range(3)]
        content = noise(4, 800)
        for volume in volumes:
            write(cluster.attach(volume), content)
        cluster.snapshot(volumes[0])
        snapshots = [completed(cluster, each) for each in cluster.snapshot(*volumes)]
        assert stored_bytes(cluster, "packs") < 800 * BLOCK_SIZE * 1.1
        for snapshot in snapshots:
            for index in (0, 1):
                assert content_of(cluster, snapshot, index) == content
        cluster.snapshotds[1].kill()
        write(cluster.uri(volumes[1]), noise(5, 20))
        after = completed(cluster, cluster.snapshot(volumes[1])[0])
        assert content_of(cluster, after) == content | noise(5, 20)


def test_what_a_prune_means_to_delete_is_stored_again_before_the_snapshot_completes(tmp_path: Path) -> None:
    """The quarantine is published and the number raised while a snapshot ships that refers to the old packs."""
    slow = dataclasses.replace(SNAPSHOTD, upload_rate_bytes=4 * MIB)
    with Cluster(tmp_path, snapshotds=1, snapshotd_settings=slow) as cluster:
        volume = cluster.create(VOLUME_SIZE)
        uri = cluster.attach(volume)
        content = noise(6, 500)
        write(uri, content)
        completed(cluster, cluster.snapshot(volume)[0])
        old = sorted((tmp_path / "store" / "packs").rglob("*"))
        copy = {number ^ 1: each for number, each in content.items() if number ^ 1 not in content}
        write(uri, copy)
        rest = {number: each for number, each in noise(7, 6000).items() if number not in copy}
        write(uri, rest)
        (snapshot,) = cluster.snapshot(volume, wait=False)
        wait_for("the ship to be under way", lambda: found(cluster, snapshot).progress.bytes_done)
        quarantine_all_packs(cluster)
        shipped = completed(cluster, snapshot)
        assert content_of(cluster, shipped) == content | copy | rest
        assert "references are checked again" in cluster.snapshotds[0].log.read_text()
        assert old


def quarantine_all_packs(cluster: Cluster) -> None:
    """What a prune does first, and no more: it names every pack that is stored, then raises the number."""

    async def publish() -> None:
        repository = await opened_repository(cluster)
        index = PackIndex(repository)
        await index.load()
        packs = {part.pack for entry in index.present() for part in entry.parts}
        stored = encode_quarantine(repository.keys, 1, packs, os.urandom(SALT_SIZE))
        await repository.store.put(quarantine_key(1), stored)
        await repository.store.close()

    asyncio.run(publish())
    (daemon,) = cluster.call("GetStore", pb.GetStoreRequest()).daemons
    number = cluster.call("GetPruneNumber", pb.GetPruneNumberRequest()).prune_number
    cluster.call("RaisePruneNumber", pb.RaisePruneNumberRequest(daemon=daemon.id, expected=number))


async def opened_repository(cluster: Cluster) -> Repository:
    keyring = await asyncio.to_thread(FileKeyring, cluster.directory / "snapshotd-0" / KEYRING, create=False)
    store = LocalStore(cluster.directory / "store")
    return await open_repository(store, keyring, "", create=False, any_owner=True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"count": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"count": 257}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"start": BLOCKS, "count": 1}, grpc.StatusCode.OUT_OF_RANGE),
        ({"root": b"short"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"root": bytes(32)}, grpc.StatusCode.DATA_LOSS),
        ({"snapshot": "snap-../../x"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"snapshot": "snap-00000000000000000"}, grpc.StatusCode.DATA_LOSS),
    ],
)
def test_a_fetch_that_makes_no_sense(
    served: tuple[Cluster, pb.Snapshot], change: Mapping[str, object], code: object
) -> None:
    cluster, snapshot = served
    fields: dict[str, Any] = {"snapshot": snapshot.id, "root": snapshot.root, "start": 0, "count": 8} | dict(change)
    with store_of(cluster) as stub, pytest.raises(grpc.RpcError) as raised:
        stub.Fetch(pb.FetchRequest(**fields))
    assert raised.value.code() is code


def test_the_first_block_comes_soon(served: tuple[Cluster, pb.Snapshot]) -> None:
    """A daemon that has read nothing yet serves a block in less than 100 ms on a busy machine; 20 ms on a quiet one."""
    assert any(took_s < 1.0 for took_s in (_first_fetch_s(*served) for _ in range(5)))


def _first_fetch_s(cluster: Cluster, snapshot: pb.Snapshot) -> float:
    """By a daemon that was just started."""
    cluster.snapshotds[0].stop()
    cluster.start(cluster.snapshotds[0])
    with store_of(cluster) as stub:
        stub.Fetch(pb.FetchRequest(snapshot=snapshot.id, root=snapshot.root, start=0, count=1))
        begun = time.monotonic()
        stub.Fetch(pb.FetchRequest(snapshot=snapshot.id, root=snapshot.root, start=0, count=256))
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, pb.Snapshot]]:
    with Cluster(tmp_path_factory.mktemp("served"), snapshotds=1) as cluster:
        volume = cluster.create(VOLUME_SIZE)
        write(cluster.attach(volume), noise(8, 200))
        yield cluster, completed(cluster, cluster.snapshot(volume)[0])
