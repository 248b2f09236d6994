"""What must hold once all faults are over: a cluster that is well, replicas that agree, and nothing left behind."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc

from blockstore.rpc import control_pb2 as pb
from blockstore.rpc import snapshot_pb2
from blockstore.storage.check import check_node
from snapshotd.layout import PACKS, SHARDS, SNAPSHOTS
from tests.cluster_simulation.cluster import SimulatedCluster
from tests.cluster_simulation.faults import WHOLE_S
from tests.cluster_simulation.guests import FAILED, SHIPPED_S, Guests

#: Of the records: what stays of a cluster in which there is nothing.
_STAYS = ("nodes/", "front-ends/", "daemons/", "snapshots.store", "deleted-snapshots/")
#: Of the object store.
_CONTENT = (PACKS, SHARDS, SNAPSHOTS)
#: What stays as it is until somebody asks for more than health: strays of old copies, and replicas that share a zone.
_KNOWN = ("is not in the catalog", " replicas in ")
_RECORDS = b"/simulated/catalog/"


async def check_healed(cluster: SimulatedCluster) -> None:
    """It becomes healthy by itself, and whole; and nobody has complaints, once somebody has done what these ask for.

    That is: nodes whose disk was lost are removed, snapshots that could not be sealed are deleted, volumes that could
    not be attached are attached again. A replica that an old copy of a disk brought back is told of for good: nothing
    is deleted only because the catalog lacks it.
    """
    assert not cluster.ended, cluster.ended

    async def at_ease() -> bool:
        status = await cluster.status()
        for node in status.nodes:
            if not node.up and not node.replicas:
                with suppress(grpc.aio.AioRpcError):
                    await cluster.call("RemoveNode", pb.RemoveNodeRequest(node=node.id))
        for volume in status.volumes:
            if "attach failed" in volume.volume.reason:
                await cluster.uri(volume.volume.id)
        await _delete_failed(cluster)
        complaints = [each for each in status.problems if not any(known in each.message for known in _KNOWN)]
        return not complaints and await cluster.whole()

    try:
        await cluster.until("nobody has complaints", at_ease, WHOLE_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {(await cluster.status()).problems}") from error


async def _delete_failed(cluster: SimulatedCluster) -> None:
    """The snapshots that were never sealed."""
    for each in (await cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest())).snapshots:
        if each.state == FAILED:
            assert not each.sealed_at_ms, f"{each.id} was sealed, and failed: {each.reason}"
            await cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=each.id))


async def check_snapshots(guests: Guests) -> None:
    """All that are left, each in a volume made from it."""
    for parts in guests.parts:
        await guests.check_together(parts)


async def scrub_all(cluster: SimulatedCluster) -> None:
    """Of what has rotted, that which nobody has read since is found by scrub alone; and mended."""
    for volume in (await cluster.status()).volumes:
        await _scrub(cluster, volume.volume.id)
    await cluster.until("what scrub found is mended", cluster.whole)


async def _scrub(cluster: SimulatedCluster, volume: str) -> None:
    begun = (await cluster.call("ScrubVolume", pb.ScrubVolumeRequest(volume=volume))).replicas
    assert all(each.number for each in begun), f"scrub of {volume} did not begin: {begun}"

    async def has_ended() -> bool:
        health = await cluster.call("GetVolumeHealth", pb.GetVolumeRequest(volume=volume))
        ended = {each.replica: each.scrub.ended for each in health.replicas}
        return all(ended.get(each.replica, 0) >= each.number for each in begun)

    await cluster.until(f"scrub of {volume} has ended", has_ended)


async def check_replicas(cluster: SimulatedCluster, rotten_journals: Collection[str] = ()) -> None:
    """Nodes are stopped, and their files looked at: sound, and of a segment the same at one position, pins included.

    rotten_journals: the nodes where a check tells, rightly, of what a start has dealt with already.
    """
    for volume in (await cluster.status()).volumes:
        await cluster.call("DetachVolume", pb.DetachVolumeRequest(volume=volume.volume.id, force=True))
    await cluster.until("replicas are at rest", lambda: _at_rest(cluster))
    members = {
        each.replica: (volume.volume.id, each.segment)
        for volume in (await cluster.status()).volumes
        for each in volume.replicas
    }
    nodes = cluster.of_kind("node")
    await cluster.stop_cleanly(nodes)
    found: dict[tuple[str, int], dict[str, tuple[Any, ...]]] = {}
    for name in nodes:
        report = check_node(cluster.place(name))
        problems = [each for each in report.problems if not (name in rotten_journals and "journal" in each.where.parts)]
        assert not problems, f"{name}: {problems}"
        for each in report.replicas:
            if place := members.pop(each.address.replica, None):
                holds = each.whole, each.applied, each.digest, each.digests
                found.setdefault(place, {})[each.address.replica] = holds
    assert not members, f"no node has these members: {members}"
    for place, replicas in found.items():
        # A log is applied as far as its replica has heard of commits, which a leader alone tells: where none served
        # since a start, logs of one end are in tables of several positions.
        assert all(whole for whole, *_ in replicas.values()), f"replicas of {place} are not whole: {replicas}"
        positions = {applied for _, applied, *_ in replicas.values()}
        assert len(set(map(str, replicas.values()))) == len(positions), f"replicas of {place} differ: {replicas}"
    for name in nodes:
        cluster.start(name)


async def _at_rest(cluster: SimulatedCluster) -> bool:
    status = await cluster.status()
    replicas = [each for volume in status.volumes for each in volume.replicas]
    up = all(each.state == "up" and not each.lag_records and not each.replaces for each in replicas)
    return up and all(not volume.volume.HasField("attachment") for volume in status.volumes)


async def check_nothing_left(cluster: SimulatedCluster) -> None:
    """All is deleted, and pruned: no replica, no record, no object stays."""

    async def decided() -> bool:
        found = await cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest())
        return all(each.state != snapshot_pb2.SNAPSHOT_STATE_PENDING for each in found.snapshots)

    await cluster.until("every snapshot is completed, or has failed", decided, SHIPPED_S)
    for snapshot in (await cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest())).snapshots:
        await cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot.id))
    for volume in (await cluster.status()).volumes:
        await cluster.call("DeleteVolume", pb.DeleteVolumeRequest(volume=volume.volume.id))

    async def gone() -> bool:
        return not await left_over(cluster)

    try:
        await cluster.until("nothing is left", gone)
    except AssertionError as error:
        raise AssertionError(f"{error}: {await left_over(cluster)}") from error
    await cluster.call_store("Prune", snapshot_pb2.PruneRequest())
    left = objects_in(cluster.store_directory)
    assert not left, f"after everything was deleted and pruned the store has {left}"


async def left_over(cluster: SimulatedCluster) -> list[str]:
    """What is there of volumes and snapshots: themselves, replicas on nodes, records of them."""
    status = await cluster.status()
    snapshots = await cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest())
    strays = {each.message.split()[1] for each in status.problems if "is not in the catalog" in each.message}
    replicas = [path for name in cluster.of_kind("node") for path in cluster.place(name).glob("replicas/*")]
    records = cluster.records.items if cluster.records else {}
    found = {key.removeprefix(_RECORDS).decode(): each for key, each in records.items() if key.startswith(_RECORDS)}
    keys = [key for key, each in found.items() if not (key.startswith("repair/") and b"vol-" not in each.value)]
    return [
        *(each.volume.id for each in status.volumes),
        *(each.id for each in snapshots.snapshots),
        *(str(path) for path in replicas if path.name not in strays),
        *(key for key in keys if not key.startswith(_STAYS)),
    ]


def objects_in(store: Path) -> list[str]:
    """What holds content, or leads to some: in an empty repository, nothing but its keys and an empty index."""
    return [
        str(path.relative_to(store))
        for kind in _CONTENT
        for path in sorted(store.glob(f"{kind}**/*"))
        if path.is_file()
    ]
