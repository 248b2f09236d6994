"""Volumes of several segments in a cluster of processes: four nodes, segments of 8 MiB."""

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, Final

import pytest

from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import BLOCK_SIZE, KIB, MIB
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.daemons import wait_for
from tests.nbd_client import NbdClient
from tests.stack import until

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SEGMENT: Final = 8 * MIB
SIZE: Final = 20 * MIB
LIMIT_S: Final = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """What a test does to its processes it undoes."""
    # Snapshots of several segments are tried once: a machine that is busy may take its time.
    control = dataclasses.replace(CONTROL, segment_size_bytes=SEGMENT, hold_limit_s=15.0)
    front_end = dataclasses.replace(FRONT_END, retry_limit_s=60.0)  # longer than a node takes to start
    with Cluster(
        tmp_path_factory.mktemp("segments"),
        zones=("a", "b", "c", "d"),
        front_ends=2,
        snapshotds=1,
        control_settings=control,
        front_end_settings=front_end,
    ) as running:
        yield running


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, LIMIT_S))


async def change(uri: str, model: bytearray, chance: random.Random, count: int = 12) -> None:
    """Writes and zeroes of any alignment and length, over boundaries of segments too; each is in the model."""
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    edges = range(SEGMENT, len(model), SEGMENT)
    for number in range(count):
        length = chance.randrange(1, 512 * KIB)
        offset = chance.randrange(len(model) - length)
        if number % 2 and edges:
            offset = min(chance.choice(edges) - length // 2, len(model) - length)
        if chance.random() < 0.7:
            data = chance.randbytes(length)
            await client.write(offset, data)
        else:
            data = bytes(length)
            await client.write_zeroes(offset, length)
        model[offset : offset + length] = data
    await client.flush()
    await client.close()


async def check(uri: str, model: bytes | bytearray) -> None:
    """All of it, in reads that cross boundaries."""
    client = await NbdClient.connect_soon(uri, LIMIT_S)
    step = 1000 * KIB
    shown = await asyncio.gather(*(client.read(at, min(step, len(model) - at)) for at in range(0, len(model), step)))
    await client.close()
    assert b"".join(shown) == bytes(model)


async def connect_to(uri: str, size_bytes: int) -> NbdClient:
    """Once the export has that size: a front-end that could not be told in time hears it with its next heartbeat."""
    while True:
        client = await NbdClient.connect_soon(uri, LIMIT_S)
        if client.size_bytes == size_bytes:
            return client
        await client.close()


def segments_of(cluster: Cluster, volume: str) -> list[control_pb2.Segment]:
    return list(cluster.volume(volume).segments)


def nodes_of(cluster: Cluster, volume: str) -> "Counter[str]":
    members = (each for segment in segments_of(cluster, volume) for each in segment.configuration.members)
    return Counter(member.node for member in members)


def restore(cluster: Cluster, snapshot: str, size_bytes: int = 0, **fields: Any) -> str:
    return cluster.create(size_bytes, snapshot=snapshot, **fields)


def until_hydrated(cluster: Cluster, volume: str) -> None:
    wait_for(f"{volume} to be hydrated", lambda: not cluster.volume(volume).HasField("source"))


def delete(cluster: Cluster, *volumes: str) -> None:
    for volume in volumes:
        cluster.detach(volume)
        cluster.call("DeleteVolume", control_pb2.DeleteVolumeRequest(volume=volume))


def test_it_is_one_volume_on_all_nodes_and_its_snapshots_bring_all_of_it_back(cluster: Cluster) -> None:
    chance = random.Random(1)
    wait_for("all to be up", cluster._all_up)
    volume = cluster.create(SIZE)
    assert [each.size_bytes for each in segments_of(cluster, volume)] == [8 * MIB, 8 * MIB, 4 * MIB]
    assert len(nodes_of(cluster, volume)) == len(cluster.nodes)
    uri = cluster.attach(volume)
    model = bytearray(SIZE)
    run(change(uri, model, chance))
    run(check(uri, model))
    (first,) = cluster.snapshot(volume)
    at_first = bytes(model)
    run(change(uri, model, chance))
    (second,) = cluster.snapshot(volume)
    at_second = bytes(model)
    run(change(uri, model, chance))

    # A larger volume made from it: segments that are partly and wholly behind the source; written while it hydrates.
    larger = restore(cluster, second, size_bytes=30 * MIB, init_rate_bytes=4 * MIB)
    restored = bytearray(at_second) + bytes(10 * MIB)
    uri_larger = cluster.attach(larger, 1)
    run(change(uri_larger, restored, chance))
    run(check(uri_larger, restored))
    until_hydrated(cluster, larger)
    run(check(uri_larger, restored))
    (third,) = cluster.snapshot(larger)

    # Of other segment sizes: boundaries lie elsewhere than in what the snapshot was made of.
    for snapshot, content, segment_size in ((first, at_first, 3 * MIB), (third, bytes(restored), 64 * MIB)):
        other = restore(cluster, snapshot, segment_size_bytes=segment_size)
        uri_other = cluster.attach(other, 1)
        run(check(uri_other, content))
        until_hydrated(cluster, other)
        run(check(uri_other, content))
        delete(cluster, other)
    run(check(cluster.uri(volume), model))
    delete(cluster, volume, larger)


def test_everything_is_killed_and_nothing_acknowledged_is_lost(cluster: Cluster) -> None:
    chance = random.Random(2)
    volume = cluster.create(SIZE)
    uri = cluster.attach(volume)
    model = bytearray(SIZE)
    for _ in range(3):
        run(change(uri, model, chance))
        for daemon in cluster.daemons:
            daemon.kill()
        cluster.start(*cluster.daemons)
        uri = cluster.uri(volume)
        run(check(uri, model))
    (snapshot,) = cluster.snapshot(volume)
    restored = restore(cluster, snapshot)
    run(check(cluster.attach(restored, 1), model))
    delete(cluster, volume, restored)


def test_one_node_lost_harms_nobody_and_a_segment_without_quorum_holds_only_its_own(cluster: Cluster) -> None:
    chance = random.Random(3)
    volume = cluster.create(SIZE)
    uri = cluster.attach(volume)
    cluster.wait_whole(volume)
    model = bytearray(SIZE)
    by_node = {daemon.read_address(): daemon for daemon in cluster.nodes}
    members = [{each.address for each in segment.configuration.members} for segment in segments_of(cluster, volume)]
    run(change(uri, model, chance))
    # Two nodes that share segment `held`, and not segment `free`.
    held, free = 0, next(number for number in (1, 2) if members[number] != members[0])
    only = (set(by_node) - members[free]).pop()
    assert only in members[held]
    by_node[only].kill()
    run(change(uri, model, chance))
    run(check(uri, model))
    other = next(address for address in members[held] & members[free] if address != only)
    by_node[other].kill()

    async def without_quorum() -> None:
        client, waiting = await NbdClient.connect_soon(uri, LIMIT_S), await NbdClient.connect_soon(uri, LIMIT_S)
        write = asyncio.create_task(waiting.write(held * SEGMENT, b"held back".ljust(BLOCK_SIZE)))
        for number in range(20):
            await client.write(free * SEGMENT + number * BLOCK_SIZE, bytes([number + 1]) * BLOCK_SIZE)
            model[free * SEGMENT + number * BLOCK_SIZE : free * SEGMENT + (number + 1) * BLOCK_SIZE] = (
                bytes([number + 1]) * BLOCK_SIZE
            )
        assert not write.done()
        cluster.start(by_node[other])  # not in a thread: a daemon ends with the thread that started it
        await write
        model[held * SEGMENT : held * SEGMENT + BLOCK_SIZE] = b"held back".ljust(BLOCK_SIZE)
        await client.close()
        await waiting.close()

    run(without_quorum())
    cluster.start(by_node[only])
    cluster.wait_whole(volume)
    run(check(uri, model))
    delete(cluster, volume)


def test_a_drained_node_gives_up_its_replica_of_every_segment(cluster: Cluster) -> None:
    """Of those that have something of the volume's origin and of those that have not: a snapshot needs them all."""
    chance = random.Random(5)
    origin = cluster.create(5 * MIB)
    at_origin = bytearray(5 * MIB)
    run(change(cluster.attach(origin), at_origin, chance))
    (snapshot,) = cluster.snapshot(origin)
    volume = restore(cluster, snapshot, size_bytes=12 * MIB)
    uri = cluster.attach(volume)
    until_hydrated(cluster, volume)
    request = control_pb2.ResizeVolumeRequest(volume=volume, size_bytes=SIZE)
    assert len(cluster.call("ResizeVolume", request).segments) == 3
    cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot))
    delete(cluster, origin)
    model = at_origin + bytes(SIZE - 5 * MIB)
    run(change(uri, model, chance))

    leaving = nodes_of(cluster, volume).most_common(1)[0][0]
    cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=leaving))

    def has_left() -> bool:
        configurations = [each.configuration for each in segments_of(cluster, volume)]
        changing = any(each.old_members or each.HasField("replacement") for each in configurations)
        return not changing and leaving not in nodes_of(cluster, volume)

    run(change(uri, model, chance))
    wait_for(f"{volume} to leave {leaving}", has_left, LIMIT_S)
    run(change(uri, model, chance))
    (whole,) = cluster.snapshot(volume)
    run(check(uri, model))
    cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=leaving, undo=True))
    restored = restore(cluster, whole)
    run(check(cluster.attach(restored, 1), model))
    delete(cluster, volume, restored)


def test_it_grows_by_segments_under_load_and_a_snapshot_before_stays_as_it_was(cluster: Cluster) -> None:
    chance = random.Random(4)
    volume = cluster.create(5 * MIB)
    uri = cluster.attach(volume)
    model = bytearray(5 * MIB)
    run(change(uri, model, chance))
    (small,) = cluster.snapshot(volume)
    at_small = bytes(model)

    async def grow() -> None:
        client = await NbdClient.connect_soon(uri, LIMIT_S)
        stop = asyncio.Event()
        written = 0

        async def write() -> None:
            nonlocal written
            while not stop.is_set():
                data, at = chance.randbytes(BLOCK_SIZE), written % 1280 * BLOCK_SIZE
                await client.write(at, data)
                model[at : at + BLOCK_SIZE] = data
                written += 1

        writing = asyncio.create_task(write())
        for size in (7 * MIB, 9 * MIB, 30 * MIB):
            request = control_pb2.ResizeVolumeRequest(volume=volume, size_bytes=size)
            await asyncio.to_thread(cluster.call, "ResizeVolume", request)
            seen = await connect_to(uri, size)
            await seen.write(size - BLOCK_SIZE, size.to_bytes(8, "big").ljust(BLOCK_SIZE))
            await seen.close()
            before = written
            await until(lambda: written >= before + 20, "the guest writes on")  # noqa: B023 - awaited in this round
        stop.set()
        await writing
        await client.close()

    run(grow())
    model += bytes(25 * MIB)
    for size in (7 * MIB, 9 * MIB, 30 * MIB):
        model[size - BLOCK_SIZE : size] = size.to_bytes(8, "big").ljust(BLOCK_SIZE)
    assert [each.size_bytes for each in segments_of(cluster, volume)] == [8 * MIB, 8 * MIB, 8 * MIB, 6 * MIB]
    run(check(uri, model))
    run(change(uri, model, chance))
    (large,) = cluster.snapshot(volume)
    at_large = bytes(model)
    run(change(uri, model, chance))
    (larger,) = cluster.snapshot(volume)
    for snapshot, content in ((small, at_small), (large, at_large), (larger, bytes(model))):
        restored = restore(cluster, snapshot)
        run(check(cluster.attach(restored, 1), content))
        until_hydrated(cluster, restored)
        delete(cluster, restored)
    cluster.detach(volume)
    run(check(cluster.attach(volume, 1), model))
    delete(cluster, volume)


def test_a_snapshot_is_one_instant_over_all_segments_and_volumes(cluster: Cluster) -> None:
    """A guest writes a number to one place, and once that is acknowledged to the next: each is in another segment."""
    volumes = [cluster.create(2 * SEGMENT) for _ in range(2)]
    uris = [cluster.attach(volume, front_end) for front_end, volume in enumerate(volumes)]
    places = [(which, half * SEGMENT) for half in (1, 0) for which in (1, 0)]

    async def write() -> list[list[snapshot_pb2.Snapshot]]:
        clients = [await NbdClient.connect_soon(uri, LIMIT_S) for uri in uris]
        made: list[list[snapshot_pb2.Snapshot]] = []
        taken = asyncio.Event()

        async def count() -> None:
            number = 0
            while not taken.is_set():
                number += 1
                for which, offset in places:
                    await clients[which].write(offset, number.to_bytes(8, "big").ljust(BLOCK_SIZE))

        counting = asyncio.create_task(count())
        for names in (volumes, volumes[:1], volumes[1:], volumes):
            request = snapshot_pb2.CreateSnapshotRequest(volumes=names)
            made.append(list((await asyncio.to_thread(cluster.call, "CreateSnapshot", request)).snapshots))
        taken.set()
        await counting
        for client in clients:
            await client.close()
        return made

    async def read(uri: str) -> dict[int, int]:
        client = await NbdClient.connect_soon(uri, LIMIT_S)
        found = {offset: int.from_bytes((await client.read(offset, 8)), "big") for offset in (0, SEGMENT)}
        await client.close()
        return found

    for group in run(write()):
        numbers: dict[tuple[int, int], int] = {}
        for each in group:
            assert each.sealed_at_ms, each.reason
            wait_for(f"{each.id} to be completed", lambda name=each.id: cluster._is_completed(name))  # type: ignore[misc]
            restored = restore(cluster, each.id)
            which = volumes.index(each.volume)
            shown = run(read(cluster.attach(restored)))
            numbers |= {(which, offset): number for offset, number in shown.items()}
            delete(cluster, restored)
        # In the order in which they were written: never the later without the earlier.
        found = [numbers[place] for place in places if place in numbers]
        assert found == sorted(found, reverse=True)
        assert found[0] - found[-1] <= 1
        assert found[0] > 0
    delete(cluster, *volumes)
