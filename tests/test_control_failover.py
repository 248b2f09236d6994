"""Several control processes on a real etcd, as processes: any may die, hang, or lose etcd."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import CONTROL, Cluster
from tests.daemons import Daemon, wait_for
from tests.etcd_server import EtcdServer, running_etcd


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path / "etcd") as server:
        yield server


def cluster_on(etcd: EtcdServer, directory: Path, **changes: int) -> Cluster:
    settings = dataclasses.replace(CONTROL, metastore=etcd.url(), leader_lease_s=2.0)
    return Cluster(directory, controls=2, control_settings=settings, **changes)  # type: ignore[arg-type]


def active(cluster: Cluster) -> tuple[Daemon, Daemon]:
    """The active control and the one that stands by, once both are known."""

    def both() -> "list[control_pb2.ControlInfo] | None":
        controls = list(cluster.status().controls)
        return controls if len(controls) == len(cluster.controls) else None

    places = wait_for("both controls to stand", both)
    assert [each.active for each in places] == [True, False]
    by_address = {each.read_address(): each for each in cluster.controls}
    first, second = (by_address[each.address] for each in places)
    return first, second


def test_the_second_takes_over_when_the_first_is_killed(etcd: EtcdServer, tmp_path: Path) -> None:
    with cluster_on(etcd, tmp_path) as cluster:
        volume = cluster.create(16 * MIB, "v")
        first, second = active(cluster)
        first.kill()
        cluster.attach(volume)
        assert [each.address for each in cluster.status().controls if each.active] == [second.read_address()]
        cluster.start(first)
        assert active(cluster) == (second, first)
