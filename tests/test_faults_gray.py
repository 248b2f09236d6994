"""Faults that nobody reports: a node that is slow, full or somewhere else than it was, and clocks that jump."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockstore.rpc import snapshot_pb2
from blockstore.units import BLOCK_SIZE, MIB
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import wait_for
from tests.faults.fault_cluster import SMALL, FaultCluster
from tests.faults.registers import History, RegisterLoad
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 32 * MIB
BLOCKS = 16
PROGRESS = 300
#: Of each sync of the slow disk: far more than a request takes on a machine that is busy.
SLOW_S = 8
#: To be served without one that is as slow as that: each would show it, if guests waited for that disk.
TRIES = 4
#: Of each sync, so that no seal is committed while writes may be held for it.
BARRIER_BROKEN_S = CONTROL.hold_limit_s + 1
HOUR_NS = 3_600_000_000_000
#: A request that waits for a node which is started is not refused meanwhile, however long that takes.
PATIENT = dataclasses.replace(FRONT_END, retry_limit_s=100.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    require_programs("gcc", "ip")
    with FaultCluster(
        tmp_path_factory.mktemp("gray"), front_ends=1, snapshotds=0, front_end_settings=PATIENT
    ) as running:
        yield running


@pytest.fixture
def volume(cluster: FaultCluster) -> Iterator[str]:
    made = cluster.create(SIZE)
    cluster.attach(made)
    yield made
    cluster.detach(made)


def test_a_slow_disk_on_one_node_slows_nobody_down(cluster: FaultCluster, volume: str) -> None:
    history = History(0, BLOCKS)
    with RegisterLoad(history, lambda: cluster.uri_now(volume)) as load:
        load.wait_progress(PROGRESS)
        cluster.steering["node-1"].set(sync_least_us=SLOW_S * 1_000_000, sync_most_us=SLOW_S * 1_000_000)
        assert any(slowest_s(load) < SLOW_S / 2 for _ in range(TRIES)), "guests waited for the slow node"
        cluster.steering["node-1"].set(sync_least_us=0, sync_most_us=0)
    cluster.wait_whole(volume, idle=True)
    history.check(cluster.uri(volume))


def slowest_s(load: RegisterLoad) -> float:
    """Of the next requests; the machine may have stood still while these were under way."""
    service = load.watch()
    load.wait_progress(PROGRESS)
    return service.slowest_s


def test_a_barrier_that_slow_disks_broke_is_made_anew_once_they_are_fast_again(cluster: FaultCluster) -> None:
    """Guests' writes are held for it no longer than its limit, and go on before it is tried again."""
    volume = cluster.create(SIZE, segment_size_bytes=SIZE // 2)
    cluster.attach(volume)
    history = History(SIZE // 2 // BLOCK_SIZE - BLOCKS // 2, BLOCKS)
    request = snapshot_pb2.CreateSnapshotRequest(volumes=[volume])

    def failed() -> str:
        """Why, once it has; empty before."""
        found = cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(volume=volume)).snapshots
        why = "; ".join(each.progress.why for each in found)
        return why if "it is tried once more" in why else ""

    with RegisterLoad(history, lambda: cluster.uri_now(volume)) as load, ThreadPoolExecutor(1) as threads:
        load.wait_progress(PROGRESS)
        slow(cluster, BARRIER_BROKEN_S)
        taken = threads.submit(cluster.call, "CreateSnapshot", request)
        why = wait_for("the first barrier to fail", failed)
        assert f"writes are held for at most {CONTROL.hold_limit_s:g} s, and" in why
        slow(cluster, 0)
        (snapshot,) = taken.result().snapshots
        load.wait_progress(PROGRESS)
    assert snapshot.state == snapshot_pb2.SNAPSHOT_STATE_PENDING, snapshot.reason
    assert 0 < snapshot.pause_us < CONTROL.hold_limit_s * 1e6
    assert not load.errors
    history.check(cluster.uri(volume))
    cluster.call("DeleteSnapshot", snapshot_pb2.DeleteSnapshotRequest(snapshot=snapshot.id))
    cluster.detach(volume)


def slow(cluster: FaultCluster, seconds: float) -> None:
    """So long takes each sync of every node from here on."""
    for node in cluster.nodes:
        cluster.steering[node.name].set(sync_least_us=int(seconds * 1e6), sync_most_us=int(seconds * 1e6))


def test_a_full_disk_on_one_node_refuses_no_guest(cluster: FaultCluster, volume: str) -> None:
    history = History(0, BLOCKS)
    with RegisterLoad(history, lambda: cluster.uri_now(volume)) as load:
        load.wait_progress(PROGRESS)
        cluster.fill_disk()
        load.wait_progress(4 * PROGRESS)
        cluster.nodes[SMALL].kill()
        cluster.start(cluster.nodes[SMALL])  # it starts on a disk that is full
        load.wait_progress(PROGRESS)
        cluster.make_room()
        cluster.wait_whole(volume)
        load.wait_progress(PROGRESS)
    assert not load.errors
    history.check(cluster.uri(volume))


def test_a_full_disk_on_one_node_and_the_restart_of_another_refuse_no_guest(cluster: FaultCluster, volume: str) -> None:
    history = History(0, BLOCKS)
    with RegisterLoad(history, lambda: cluster.uri_now(volume)) as load:
        load.wait_progress(PROGRESS)
        cluster.fill_disk()
        wait_for("control to hear of the full node", lambda: any(node.full for node in cluster.status().nodes))
        cluster.nodes[1].kill()
        wait_for("the status to say why writes wait", lambda: says(cluster, "wait or fail with ENOSPC (full: node-"))
        cluster.start(cluster.nodes[1])
        load.wait_progress(PROGRESS)
        wait_for("the status to say no more of it", lambda: not says(cluster, "ENOSPC"))
        cluster.make_room()
        cluster.wait_whole(volume)
    assert not load.errors
    history.check(cluster.uri(volume))


def says(cluster: FaultCluster, text: str) -> bool:
    return any(text in problem.message for problem in cluster.status().problems)


@pytest.mark.parametrize("names", [["front-end-0"], ["node-0", "node-1", "node-2"], ["control"]])
def test_a_clock_that_jumps_changes_nothing(cluster: FaultCluster, volume: str, names: list[str]) -> None:
    history = History(0, BLOCKS)
    with RegisterLoad(history, lambda: cluster.uri_now(volume)) as load:
        for hours in (30, -30, 0):
            for name in names:
                cluster.steering[name].set(clock_offset_ns=hours * HOUR_NS)
            load.wait_progress(PROGRESS)
            cluster.wait_whole(volume)
    assert not load.errors
    history.check(cluster.uri(volume))


def test_two_nodes_with_swapped_addresses_are_told_apart(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        cluster.attach(volume)
        one, other = cluster.nodes[:2]
        with Workload(lambda: cluster.uri_now(volume), range(SIZE // SECTOR_SIZE)) as load:
            load.wait_progress(PROGRESS)
            addresses = [one.read_address(), other.read_address()]
            for node in (one, other):
                node.kill()
            for node, address in zip((other, one), addresses, strict=True):
                node.command += ["--listen", address]
            cluster.start(one, other)
            assert [other.read_address(), one.read_address()] == addresses
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
        load.verify(cluster.uri(volume))
        assert_replicas_agree(cluster, volume)
