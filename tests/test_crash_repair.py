"""Replicas move while guests write: a node lost for good, a drain, and everything killed in the middle of it.

The same two witnesses as elsewhere: fio verifies one half, clients with a model of what was acknowledged work on
the other. At the end the replicas that are members by then are compared by their files.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from blockstore.rpc import control_pb2, replica_pb2, replica_pb2_grpc
from blockstore.units import MIB
from tests.cluster import CONTROL, Cluster
from tests.crash.fio import FioLoop, verify
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import wait_for
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]

SIZE = 64 * MIB
FIO_SIZE = 16 * MIB
SECTORS = range(SIZE // 2 // SECTOR_SIZE)
PROGRESS = 200
MOVED_LIMIT_S = 120.0
ZONES = ("a", "b", "c", "d")
#: Soon, or the tests would take long; longer than a node takes to start again.
IMPATIENT = dataclasses.replace(CONTROL, replace_after_s=3.0)
PATIENT = dataclasses.replace(CONTROL, replace_after_s=0.0)


def node_ids(cluster: Cluster) -> list[str]:
    """By index, as the daemons are."""
    nodes = {each.address: each.id for each in cluster.status().nodes}
    return [nodes[daemon.read_address()] for daemon in cluster.nodes]


def configuration(cluster: Cluster, volume: str) -> control_pb2.Configuration:
    return cluster.volume(volume).segments[0].configuration


def members(cluster: Cluster, volume: str) -> set[str]:
    """The nodes that hold a member, once no change is under way."""
    now = configuration(cluster, volume)
    changing = now.old_members or now.HasField("replacement")
    return set() if changing else {each.node for each in now.members}


def wait_moved(cluster: Cluster, volume: str, away: str) -> set[str]:
    """Until that node holds no member of it; who does then."""

    def moved() -> set[str]:
        found = members(cluster, volume)
        return found if away not in found else set()

    try:
        return wait_for(f"{volume} to leave {away}", moved, MOVED_LIMIT_S)
    except TimeoutError as error:
        raise TimeoutError(f"{error}: {cluster.health(volume)}") from error


def replicas_on(cluster: Cluster, index: int) -> list[str]:
    """What the node itself says that it has."""
    with grpc.insecure_channel(cluster.nodes[index].read_address()) as channel:
        answer = replica_pb2_grpc.ReplicaStub(channel).ListReplicas(replica_pb2.ListReplicasRequest(), timeout=60)
    return [each.target.replica for each in answer.replicas]


def drain(cluster: Cluster, node: str, *, undo: bool = False) -> None:
    cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=node, undo=undo))


@contextmanager
def under_load(cluster: Cluster, volume: str, directory: Path) -> Iterator[Workload]:
    """Both witnesses write; what they had acknowledged is there at the end, on all replicas."""
    require_programs("fio")
    witness = FioLoop(lambda: cluster.uri_now(volume), directory, offset=SIZE // 2, size=FIO_SIZE)
    with Workload(lambda: cluster.uri_now(volume), SECTORS) as load, witness:
        load.wait_progress(PROGRESS)
        yield load
        load.wait_progress(PROGRESS)
    witness.check_last()
    load.verify(cluster.uri(volume))
    cluster.wait_whole(volume)


def test_a_node_that_is_lost_for_good_is_replaced_and_discarded_when_it_returns(tmp_path: Path) -> None:
    with Cluster(tmp_path, zones=ZONES, control_settings=IMPATIENT) as cluster:
        volume = cluster.create(SIZE)
        cluster.attach(volume)
        ids = node_ids(cluster)
        lost = next(index for index, node in enumerate(ids) if node in members(cluster, volume))
        old = set(replicas_on(cluster, lost))
        with under_load(cluster, volume, tmp_path) as load:
            cluster.nodes[lost].kill()
            found = wait_moved(cluster, volume, ids[lost])
            assert found == set(ids) - {ids[lost]}
            load.wait_progress(PROGRESS)
            cluster.start(cluster.nodes[lost])
            wait_for("the old replica to be deleted", lambda: not old.intersection(replicas_on(cluster, lost)))
        assert old
        assert_replicas_agree(cluster, volume)


def test_a_drain_goes_on_while_all_that_take_part_in_it_are_killed(tmp_path: Path) -> None:
    slow = dataclasses.replace(PATIENT, rebuild_rate_bytes=MIB // 32)  # else it ends before all are killed
    with Cluster(tmp_path, zones=ZONES, control_settings=slow) as cluster:
        volume = cluster.create(SIZE)
        cluster.attach(volume)
        ids = node_ids(cluster)
        before = members(cluster, volume)
        leaving, source = sorted(ids.index(node) for node in before)[:2]
        newcomer = next(index for index, node in enumerate(ids) if node not in before)
        verify(cluster.uri(volume), tmp_path, offset=SIZE // 2, size=FIO_SIZE, seed=1)  # fio does not connect again
        with Workload(lambda: cluster.uri_now(volume), SECTORS) as load:
            drain(cluster, ids[leaving])
            for victim in (cluster.control, cluster.nodes[source], cluster.front_ends[0], cluster.nodes[newcomer]):
                wait_for("the newcomer to be filled", lambda: is_filled(cluster, volume), MOVED_LIMIT_S)
                victim.kill()
                cluster.start(victim)
                load.wait_progress(PROGRESS)
            cluster.call("SetRepair", control_pb2.SetRepairRequest(rebuild_rate_bytes=0))
            assert wait_moved(cluster, volume, ids[leaving]) == set(ids) - {ids[leaving]}
            wait_for("the old replica to be deleted", lambda: not replicas_on(cluster, leaving))
            load.wait_progress(PROGRESS)
        verify(cluster.uri(volume), tmp_path, offset=SIZE // 2, size=FIO_SIZE, seed=1, only=True)
        load.verify(cluster.uri(volume))
        remove(cluster, leaving, ids[leaving])
        assert_replicas_agree(cluster, volume)


def test_a_volume_that_nobody_has_attached_is_made_whole_as_well(tmp_path: Path) -> None:
    """Also where the disk of a node was emptied: the replica is made anew there, under another id."""
    with Cluster(tmp_path, control_settings=IMPATIENT) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        verify(uri, tmp_path, offset=0, size=FIO_SIZE, seed=1)
        cluster.detach(volume)
        old = {each.replica for each in configuration(cluster, volume).members}
        cluster.nodes[0].kill()
        shutil.rmtree(cluster.data_of(0) / "replicas" / next(iter((cluster.data_of(0) / "replicas").iterdir())).name)
        cluster.start(cluster.nodes[0])

        def made_anew() -> bool:
            now = configuration(cluster, volume)
            return now.number == 3 and len(old & {each.replica for each in now.members}) == 2

        wait_for("another replica to be a member", made_anew, MOVED_LIMIT_S)
        assert cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE
        verify(cluster.attach(volume), tmp_path, offset=0, size=FIO_SIZE, seed=1, only=True)
        assert_replicas_agree(cluster, volume)


def is_filled(cluster: Cluster, volume: str) -> bool:
    """Its newcomer is there, and says how far it is, or where its log ends."""
    found = [each for each in cluster.health(volume).replicas if each.replaces]
    return bool(found) and found[0].state == "filling"


def remove(cluster: Cluster, index: int, node: str) -> None:
    """Stop a drained node, and have control forget it."""
    cluster.nodes[index].stop()
    wait_for("it to be down", lambda: not next(each.up for each in cluster.status().nodes if each.id == node))
    cluster.call("RemoveNode", control_pb2.RemoveNodeRequest(node=node))
    assert node not in {each.id for each in cluster.status().nodes}
