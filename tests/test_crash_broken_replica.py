"""A broken replica keeps no node from starting: the others serve, another one takes its place, and people are told."""

import dataclasses
import os
from pathlib import Path

import pytest

from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import CONTROL, Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import wait_for

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 32 * MIB
PROGRESS = 200
MOVED_LIMIT_S = 120.0
BROKEN = 0
#: Soon, or the test would take long.
IMPATIENT = dataclasses.replace(CONTROL, replace_after_s=1.0)


def replicas_of(cluster: Cluster, volume: str) -> dict[str, control_pb2.ReplicaHealth]:
    """By the node's address."""
    addresses = {each.id: each.address for each in cluster.status().nodes}
    return {addresses[each.node]: each for each in cluster.health(volume).replicas}


def told(cluster: Cluster, *words: str) -> bool:
    return any(all(word in each.message for word in words) for each in cluster.status().problems)


def break_files(directory: Path) -> dict[str, bytes]:
    """All of them are rubbish, as they are then; new files, since the front-end may have the old ones mapped."""
    for path in tuple(directory.iterdir()):
        size = path.stat().st_size
        path.unlink()
        path.write_bytes(os.urandom(size))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_replica_of_which_nothing_can_be_read(tmp_path: Path) -> None:
    with Cluster(tmp_path, control_settings=IMPATIENT) as cluster:
        volume, other = cluster.create(SIZE), cluster.create(SIZE)
        for each in (volume, other):
            cluster.attach(each)
        node = cluster.nodes[BROKEN]
        lost = replicas_of(cluster, volume)[node.read_address()].replica
        spared = replicas_of(cluster, other)[node.read_address()].replica
        directory = cluster.data_of(BROKEN) / "replicas" / lost
        place = directory.with_name(f"{lost}.broken")
        with (
            Workload(lambda: cluster.uri_now(volume), range(SIZE // SECTOR_SIZE)) as load,
            Workload(lambda: cluster.uri_now(other), range(SIZE // SECTOR_SIZE), seed=2) as beside,
        ):
            load.wait_progress(PROGRESS)
            node.kill()
            rubbish = break_files(directory)
            cluster.start(node)
            wait_for("people to be told", lambda: told(cluster, lost, str(place)))

            def is_replaced() -> bool:
                now = replicas_of(cluster, volume).get(node.read_address())
                return now is not None and now.replica != lost and now.state == "up" and not now.replaces

            wait_for("another replica to take its place", is_replaced, MOVED_LIMIT_S)
            load.wait_progress(PROGRESS)
            beside.wait_progress(PROGRESS)
        for each, model in ((volume, load), (other, beside)):
            cluster.wait_whole(each)
            model.verify(cluster.uri(each))
        assert replicas_of(cluster, other)[node.read_address()].replica == spared

        # It stays as it is, and is told of, until a person removes it.
        assert {path.name: path.read_bytes() for path in place.iterdir()} == rubbish
        node.kill()
        cluster.start(node)
        wait_for("people to be told again", lambda: told(cluster, lost, str(place), "remove it"))
        assert {path.name: path.read_bytes() for path in place.iterdir()} == rubbish
        place.rename(tmp_path / "elsewhere")
        wait_for("nobody to be told any more", lambda: not told(cluster, lost))
        cluster.detach(other)
        assert_replicas_agree(cluster, volume)
