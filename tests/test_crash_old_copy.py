"""A node whose disk was put back from an old copy: what it acknowledged and no longer has is noticed and mended."""

import shutil
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload

pytestmark = pytest.mark.xdist_group("load")

SIZE = 32 * MIB
SECTORS = range(SIZE // SECTOR_SIZE)
PROGRESS = 200


def test_an_old_copy_put_back_is_filled_again(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        volume = cluster.create(SIZE)
        cluster.attach(volume)
        node = cluster.nodes[0]
        with Workload(lambda: cluster.uri_now(volume), SECTORS) as load:
            load.wait_progress(PROGRESS)
            node.kill()
            shutil.copytree(node.directory, tmp_path / "old")
            cluster.start(node)
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
            # The front-end goes as well, so that nobody who saw the acknowledgements lives on but in the metastore.
            node.kill()
            cluster.front_ends[0].kill()
            shutil.rmtree(node.directory)
            shutil.copytree(tmp_path / "old", node.directory)
            cluster.start(node, *cluster.front_ends)
            cluster.wait_whole(volume)
            load.wait_progress(PROGRESS)
        load.verify(cluster.uri(volume))
        assert_replicas_agree(cluster, volume)
