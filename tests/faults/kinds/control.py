"""Control and etcd that end, hang or are cut off: guests go on, and what was asked of them is done all the same."""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import grpc

from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import BLOCK_SIZE
from tests.daemons import Daemon, wait_for
from tests.faults.fault_cluster import FaultCluster
from tests.faults.kinds.fault import complete_and_delete, healed, insist, killed, paused_now
from tests.faults.kinds.replicas import drain, empty, some_node, undrain
from tests.nbd_client import NbdClient

#: From a request on until control is killed, at most: a request takes some tenths of a second.
_WITHIN_S: Final = 0.4
_LIMIT_S: Final = 60.0


def control_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """The active one; another takes over."""
    return killed(cluster, [cluster.active()])


def all_controls_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    return killed(cluster, cluster.controls)


@contextmanager
def control_stopped(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """By SIGTERM: it gives its place back at once."""
    active = cluster.active()
    status = active.stop()
    assert status == 0, f"{active.name} ended with {status}:\n{active.tail()}"
    yield active.name
    cluster.start(active)


@contextmanager
def control_paused(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """SIGSTOP, until another one has taken over: it wakes up as one that knows nothing of that."""
    active = cluster.active()
    with paused_now(active) as who:
        _wait_succeeded(cluster, active)
        yield who


@contextmanager
def control_cut_from_etcd(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """All others reach both; another control takes over."""
    active = cluster.active()
    with healed(cluster):
        cluster.network.cut([active.name], [each.name for each in cluster.stores])
        _wait_succeeded(cluster, active)
        yield f"{active.name} | etcd"


@contextmanager
def controls_apart(cluster: FaultCluster, chance: random.Random) -> Iterator[str]:
    """The active one has one member of etcd and half of the nodes on its side, the other control has the rest."""
    active = cluster.active()
    stores, nodes = [each.name for each in cluster.stores], [each.name for each in cluster.nodes]
    chance.shuffle(stores)
    chance.shuffle(nodes)
    here = [active.name, stores[0], *nodes[: len(nodes) // 2]]
    there = [*(each.name for each in cluster.controls if each is not active), *stores[1:]]
    with healed(cluster):
        cluster.network.cut(here[:2], [*there, *nodes[len(nodes) // 2 :]])
        cluster.network.cut(there, here)
        _wait_succeeded(cluster, active)
        yield f"{', '.join(here)} | {', '.join(there)}"


def etcd_member_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """Its leader, or one of the others."""
    return _etcd_killed(cluster, [chance.choice(cluster.stores)])


def etcd_killed(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """All members: nobody can create, attach or take a snapshot."""
    return _etcd_killed(cluster, cluster.stores)


@contextmanager
def _etcd_killed(cluster: FaultCluster, members: list[Daemon]) -> Iterator[str]:
    assert cluster.etcd is not None
    for each in members:
        each.kill()
    yield ", ".join(each.name for each in members)
    cluster.etcd.start()


# ---- in the middle of work


def killed_attaching(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """The active control, while a volume is attached, written to, and detached."""
    return _killed_during(cluster, chance, lambda: _attach_and_detach(cluster))


def killed_snapshotting(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """The active control, while two volumes are sealed at one instant: all of it is made, or none."""
    return _killed_during(cluster, chance, lambda: _snapshot(cluster))


def killed_draining(cluster: FaultCluster, chance: random.Random) -> AbstractContextManager[str]:
    """The active control, while replicas leave a node."""
    node = some_node(cluster, chance)

    def work() -> None:
        drain(cluster, node)
        wait_for(f"{node} to be empty", lambda: empty(cluster, node), _LIMIT_S)
        undrain(cluster, node)

    return _killed_during(cluster, chance, work)


@contextmanager
def _killed_during(cluster: FaultCluster, chance: random.Random, work: Callable[[], None]) -> Iterator[str]:
    """It is to succeed all the same."""
    active = cluster.active()
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        time.sleep(chance.uniform(0, _WITHIN_S))  # the instant of a crash is anybody's guess
        with killed(cluster, [active]) as who:
            yield who
        working.result()


def _attach_and_detach(cluster: FaultCluster) -> None:
    """What it shows is what was written when it was attached the last time."""
    attach = control_pb2.AttachVolumeRequest(volume=cluster.spare)
    insist(lambda: cluster.call("AttachVolume", attach))
    wait_for("the spare volume to be served", lambda: cluster.health(cluster.spare).serving == "serving", _LIMIT_S)
    (uri, *_) = cluster.volume(cluster.spare).attachment.uris
    asyncio.run(asyncio.wait_for(_count(uri), _LIMIT_S))
    wait_for("the spare volume to be detached", lambda: _detached(cluster), _LIMIT_S)


async def _count(uri: str) -> None:
    """The first two blocks show one number; write the next one."""
    client = await NbdClient.connect(uri)
    blocks = await client.read(0, 2 * BLOCK_SIZE)
    number = int.from_bytes(blocks[:8])
    assert blocks == number.to_bytes(8).ljust(BLOCK_SIZE, b"\0") * 2, f"the spare volume shows {blocks[:16].hex()}"
    await client.write(0, (number + 1).to_bytes(8).ljust(BLOCK_SIZE, b"\0") * 2)
    await client.close()


def _detached(cluster: FaultCluster) -> bool:
    """Now; who detaches what is detached, or is being detached, is refused."""
    if cluster.volume(cluster.spare).state == control_pb2.VOLUME_STATE_AVAILABLE:
        return True
    try:
        insist(lambda: cluster.call("DetachVolume", control_pb2.DetachVolumeRequest(volume=cluster.spare)))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise
    return False


def _snapshot(cluster: FaultCluster) -> None:
    """Of both volumes; the same request made again finds what it made the first time."""
    request = snapshot_pb2.CreateSnapshotRequest(
        volumes=[cluster.witnessed, cluster.spare], client_token=secrets.token_hex(16)
    )
    made = insist(lambda: cluster.call("CreateSnapshot", request)).snapshots
    assert len({bool(each.sealed_at_ms) for each in made}) == 1, f"only a part of them is sealed: {made}"
    for each in made:
        if each.sealed_at_ms:
            complete_and_delete(cluster, each.id)
        else:
            delete = snapshot_pb2.DeleteSnapshotRequest(snapshot=each.id)
            insist(lambda delete=delete: cluster.call("DeleteSnapshot", delete))  # type: ignore[misc]


def _wait_succeeded(cluster: FaultCluster, before: Daemon) -> None:
    """Until another one is active."""
    wait_for(f"another control than {before.name} to be active", lambda: cluster.active() is not before, _LIMIT_S)
