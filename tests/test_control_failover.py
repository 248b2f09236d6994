"""Several control processes on a real etcd, as processes: any may die, hang, or lose etcd, and so may etcd."""

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blockstore.rpc import control_pb2, control_pb2_grpc, snapshot_pb2
from blockstore.units import MIB
from tests.cluster import CAIRN, CONTROL, Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.workload import Workload
from tests.daemons import Daemon, wait_for
from tests.etcd_server import EtcdServer, running_etcd
from tests.proxy import Proxy

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]

LEASE_S = 4.0
#: Of nodes and front-ends: nobody is gone because the machine is busy.
PATIENT_LEASE_S = 15.0
#: For another control to take over, on a machine that is.
LIMIT_S = 120.0
SIZE = 32 * MIB
SECTORS = range(SIZE // SECTOR_SIZE)
PROGRESS = 200
_AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path / "etcd") as server:
        yield server


@contextmanager
def cluster_on(url: str, directory: Path, *, lease_s: float = LEASE_S, **changes: Any) -> Iterator[Cluster]:
    settings = dataclasses.replace(CONTROL, metastore=url, leader_lease_s=lease_s, lease_s=PATIENT_LEASE_S)
    with Cluster(directory, controls=2, control_settings=settings, **changes) as cluster:
        yield cluster


def roles(cluster: Cluster) -> tuple[Daemon, Daemon]:
    """The active control and the one that stands by, once both are known."""

    def both() -> "list[control_pb2.ControlInfo] | None":
        controls = list(cluster.status().controls)
        return controls if [each.active for each in controls] == [True, False] else None

    places = wait_for("one of both controls to be active", both, LIMIT_S)
    by_address = {each.read_address(): each for each in cluster.controls}
    active, other = (by_address[each.address] for each in places)
    return active, other


def until_healthy(cluster: Cluster) -> None:
    """All have been heard, and nothing is wrong."""
    wait_for("the cluster to be healthy", lambda: is_well(cluster.status()), LIMIT_S)


def is_well(status: control_pb2.StatusResponse) -> bool:
    return status.healthy and not status.problems


def again_and_again(call: Callable[[], Any]) -> Any:
    """What it answers once there is an active control. What is left open, as by one that is away, is asked again."""

    def once() -> Any:
        try:
            return call()
        except grpc.RpcError as error:
            if error.code() not in _AWAY:
                raise
            return None

    return wait_for("control to answer", once, LIMIT_S)


def created(cluster: Cluster, token: str) -> str:
    """The id of the volume with that name and token, once it is available."""
    create = control_pb2.CreateVolumeRequest(size_bytes=SIZE, name=token, client_token=token)
    volume: str = again_and_again(lambda: cluster.call("CreateVolume", create)).id

    def is_available() -> bool:
        return cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE

    again_and_again(is_available)
    return volume


def test_the_active_one_may_be_killed_at_any_time(etcd: EtcdServer, tmp_path: Path) -> None:
    """In the middle of creating, attaching and snapshotting; what was acknowledged stands, and nothing is half done."""
    with cluster_on(etcd.url(), tmp_path, snapshotds=1) as cluster:
        snapshots: list[str] = []

        def work(number: int) -> None:
            volume = created(cluster, f"v{number}")
            attach = control_pb2.AttachVolumeRequest(volume=volume)
            again_and_again(lambda: cluster.call("AttachVolume", attach))
            snapshot = snapshot_pb2.CreateSnapshotRequest(volumes=[volume], client_token=f"s{number}")
            taken = again_and_again(lambda: cluster.call("CreateSnapshot", snapshot))
            snapshots.extend(each.id for each in taken.snapshots)

        delays_s = (0.1, 0.4)
        for number, delay_s in enumerate(delays_s):
            active, _ = roles(cluster)
            with ThreadPoolExecutor(1) as worker:
                working = worker.submit(work, number)
                wait([working], delay_s)
                active.kill()
            working.result()
            cluster.start(active)
            roles(cluster)
        volumes = cluster.call("ListVolumes", control_pb2.ListVolumesRequest()).volumes
        assert sorted(each.name for each in volumes) == [f"v{number}" for number in range(len(delays_s))]
        listed = cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest()).snapshots
        assert sorted(each.id for each in listed) == sorted(snapshots)
        for each in snapshots:
            wait_for(f"{each} to be completed", lambda snapshot=each: cluster._is_completed(snapshot))  # type: ignore[misc]
        until_healthy(cluster)


def test_one_that_was_paused_past_its_lease_changes_nothing_when_it_wakes_up(etcd: EtcdServer, tmp_path: Path) -> None:
    with cluster_on(etcd.url(), tmp_path) as cluster:
        volume, spare = cluster.create(SIZE, "v"), cluster.create(SIZE, "w")
        paused, other = roles(cluster)
        address = paused.read_address()
        with grpc.insecure_channel(address) as channel:
            stub = control_pb2_grpc.ControlStub(channel)
            stub.GetVolume(control_pb2.GetVolumeRequest(volume=volume))
            paused.pause()
            late: list[Any] = [
                stub.CreateVolume.future(control_pb2.CreateVolumeRequest(size_bytes=SIZE, name="late"), timeout=120),
                stub.DeleteVolume.future(control_pb2.DeleteVolumeRequest(volume=spare), timeout=120),
            ]
            try:
                # It has taken over once it answers a change: that one's fence is gone by then.
                again_and_again(lambda: cluster.call("AttachVolume", control_pb2.AttachVolumeRequest(volume=volume), 5))
            finally:
                paused.resume()
            for each in late:
                assert each.exception(60).code() is grpc.StatusCode.UNAVAILABLE, each.exception()
            known = f"the active one is at {other.read_address()}"
            wait_for("it to stand by, and to know who is active", lambda: known in refused(stub))
        wait_for("it to stand by", lambda: roles(cluster) == (other, paused))
        assert sorted(each.volume.name for each in cluster.status().volumes) == ["v", "w"]
        assert cluster.volume(spare).state == control_pb2.VOLUME_STATE_AVAILABLE
        assert cluster.volume(volume).state == control_pb2.VOLUME_STATE_IN_USE
        until_healthy(cluster)
        check_command(cluster)


def refused(stub: Any) -> str:
    """What a control that stands by says; empty where it does not."""
    try:
        list(stub.Status(control_pb2.StatusRequest(), timeout=5))
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and "the active one is at" in str(error.details()):
            return str(error.details())
    return ""


def check_command(cluster: Cluster) -> None:
    """`cairn status`, told all controls; and told only the one that stands by."""

    def cairn(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([CAIRN, *arguments], capture_output=True, text=True, timeout=60, check=False)

    def told() -> bool:
        """Not where another one takes over just then."""
        status = cairn("status", "--control", cluster.control_address, "-o", "json")
        controls = json.loads(status.stdout)["controls"] if status.returncode == 0 else []
        if [each["state"] for each in controls] != ["active", "standing-by"]:
            return False
        active, other = (each["address"] for each in controls)
        alone = cairn("status", "--control", other)
        return alone.returncode == 8 and active in alone.stderr.replace("\n", "")

    wait_for("`cairn status` to tell which is active", told)
    assert "standing-by" in cairn("status", "--control", cluster.control_address).stdout


def test_attached_volumes_go_on_while_all_of_control_and_etcd_are_away(etcd: EtcdServer, tmp_path: Path) -> None:
    with cluster_on(etcd.url(), tmp_path) as cluster:
        volume, spare = cluster.create(SIZE), cluster.create(SIZE)
        uri = cluster.attach(volume)
        with Workload(lambda: uri, SECTORS) as load:
            load.wait_progress(PROGRESS)
            # etcd alone: both controls live on, and hear of nothing. It comes back without what it had before.
            etcd.kill()
            load.wait_progress(PROGRESS)
            time.sleep(LEASE_S)  # the lease of the active one runs out meanwhile, if etcd takes it so
            etcd.start()
            etcd.compact()
            again_and_again(lambda: cluster.attach(spare))
            # Everything.
            for each in (*cluster.controls, *etcd.members):
                each.kill()
            load.wait_progress(2 * PROGRESS)
            cluster.nodes[0].kill()
            load.wait_progress(PROGRESS)
            etcd.start()
            etcd.compact()
            cluster.start(*cluster.controls, cluster.nodes[0])
            cluster.wait_whole(volume)
            again_and_again(lambda: detached(cluster, spare))
        load.verify(uri)
        until_healthy(cluster)


def test_etcd_may_lose_a_member_and_control_hands_over_at_once_when_it_is_stopped(tmp_path: Path) -> None:
    """The lease is longer than the test waits: an active one that is stopped gives its place back."""
    with (
        running_etcd(tmp_path / "etcd", members=3) as etcd,
        cluster_on(etcd.url(), tmp_path, lease_s=2 * LIMIT_S) as cluster,
    ):
        for number, member in enumerate(etcd.members):
            member.kill()
            created(cluster, f"v{number}")
            etcd.start()
        active, other = roles(cluster)
        assert active.stop() == 0, active.tail()
        created(cluster, "last")
        remaining = [(other.read_address(), True)]

        def alone() -> bool:
            return [(each.address, each.active) for each in cluster.status().controls] == remaining

        wait_for("the other one to be alone", alone)
        cluster.start(active)
        assert roles(cluster) == (other, active)


def test_an_etcd_that_answers_too_late_is_as_one_that_is_away(etcd: EtcdServer, tmp_path: Path) -> None:
    """What control sent before, and nobody answered, arrives when the network delivers again."""
    proxy = Proxy()
    proxy.start(etcd.clients[0])
    try:
        with cluster_on(f"etcd://{proxy.address}/cairn", tmp_path) as cluster:
            until_healthy(cluster)
            create = control_pb2.CreateVolumeRequest(size_bytes=SIZE, name="v", client_token="t")
            for _ in range(3):
                proxy.hold()
                asked = cluster.api.CreateVolume.future(create, timeout=LEASE_S * 4)
                wait_for("the active one to give up", lambda asked=asked: asked.done() or nobody(cluster))  # type: ignore[misc]
                proxy.restore()
                volume = again_and_again(lambda: cluster.call("CreateVolume", create)).id
                asked.exception()  # it has ended: later it could make another one
                volumes = cluster.call("ListVolumes", control_pb2.ListVolumesRequest()).volumes
                assert [each.id for each in volumes] == [volume]
                again_and_again(lambda volume=volume: deleted(cluster, volume))  # type: ignore[misc]
                wait_for("it to be gone", lambda: not cluster.status().volumes)
    finally:
        proxy.close()


def detached(cluster: Cluster, volume: str) -> bool:
    cluster.detach(volume)
    return True


def deleted(cluster: Cluster, volume: str) -> bool:
    """Also by a call before this one, which was left open."""
    try:
        cluster.call("DeleteVolume", control_pb2.DeleteVolumeRequest(volume=volume))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
    return True


def nobody(cluster: Cluster) -> bool:
    """No control says that it is active."""
    try:
        cluster.api.GetVolume(control_pb2.GetVolumeRequest(volume="absent"), timeout=1)
    except grpc.RpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False
