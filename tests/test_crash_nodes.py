"""kill -9 of nodes, of the front-end and of everything: no acknowledged write is lost, no wrong byte read.

Two witnesses share the volume: fio verifies one half, our own clients with a model of what was
acknowledged work on the other. At the end the replicas are compared by their files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import Cluster
from tests.crash.fio import FioLoop, verify
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import Daemon
from tests.programs import require_programs

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 64 * MIB
FIO_SIZE = 16 * MIB
SECTORS = range(SIZE // 2 // SECTOR_SIZE)
#: Requests between two events: some hundred records, and a checkpoint or two.
PROGRESS = 300


def test_each_node_is_killed_and_comes_back(tmp_path: Path) -> None:
    require_programs("fio")
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        witness = FioLoop(lambda: uri, tmp_path, offset=SIZE // 2, size=FIO_SIZE)
        with Workload(lambda: uri, SECTORS) as load, witness:
            for node in cluster.nodes:
                load.wait_progress(PROGRESS)
                node.kill()
                load.wait_progress(PROGRESS)
                cluster.start(node)
                cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
        witness.check_last()
        load.verify(uri)
        assert_replicas_agree(cluster, volume)


def test_the_front_end_is_killed_and_comes_back(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 3, lambda cluster: cluster.front_ends)


def test_all_are_killed_at_once_and_come_back(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 2, lambda cluster: cluster.daemons)


def kill_again_and_again(directory: Path, times: int, some: Callable[[Cluster], Sequence[Daemon]]) -> None:
    """Under load: `some` of its processes are killed and started `times` times, and nothing is lost."""
    require_programs("fio")
    with Cluster(directory) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        verify(uri, directory, offset=SIZE // 2, size=FIO_SIZE, seed=1)
        with Workload(lambda: cluster.uri_now(volume), SECTORS) as load:
            for _ in range(times):
                load.wait_progress(PROGRESS)
                for daemon in some(cluster):
                    daemon.kill()
                cluster.start(*some(cluster))
            load.wait_progress(PROGRESS)
            verify(cluster.uri(volume), directory, offset=SIZE // 2, size=FIO_SIZE, seed=1, only=True)
        load.verify(cluster.uri(volume))
        assert_replicas_agree(cluster, volume)


def test_io_goes_on_without_control(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        with Workload(lambda: uri, SECTORS) as load:
            load.wait_progress(PROGRESS)
            cluster.control.kill()
            load.wait_progress(2 * PROGRESS)
            cluster.start(cluster.control)
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
        load.verify(uri)
        assert_replicas_agree(cluster, volume)


def test_a_node_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        with Workload(lambda: uri, SECTORS) as load:
            for node in cluster.nodes:
                load.wait_progress(PROGRESS)
                node.pause()
                load.wait_progress(PROGRESS)
                node.resume()
                cluster.wait_whole(volume)
        load.verify(uri)
        assert_replicas_agree(cluster, volume)
