"""Scrub of a real cluster: a disk that rots under a node that runs, in a volume that nobody has attached."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockstore.cli.daemons import CAIRN
from tests.cli_guest import read, write
from tests.cluster import CONTROL, Cluster
from tests.daemons import wait_for
from tests.table_flips import flip

MIB = 1 << 20
pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]


def scrub(cluster: Cluster, volume: str, expect: int = 0) -> Any:
    environment = os.environ | {"CAIRN_CONTROL": cluster.control_address}
    argv = [*CAIRN, "volume", "scrub", volume, "--wait", "--output", "json"]
    done = subprocess.run(argv, env=environment, capture_output=True, check=False, timeout=200)
    assert done.returncode == expect, done.stderr.decode()
    return json.loads(done.stdout)


def test_what_rots_in_a_detached_volume_is_mended_by_scrub(tmp_path: Path) -> None:
    settings = dataclasses.replace(CONTROL, lease_s=15.0)  # nobody is gone because the machine is busy
    with Cluster(tmp_path, control_settings=settings) as cluster:
        volume = cluster.create(16 * MIB)
        uri = cluster.attach(volume)
        content = os.urandom(MIB)
        write(uri, 3 * MIB, content)
        cluster.wait_whole(volume)
        cluster.detach(volume)
        for node in cluster.nodes:  # which brings all into the tables, and forgets who the members are
            assert node.stop() == 0
        before = {each.id: each.last_heartbeat_ms for each in cluster.status().nodes}
        cluster.start(*cluster.nodes)
        (path,) = cluster.data_of(1).rglob("tables.mdb")
        flip(path, content[4096 : 4096 + 4080], 1000)

        def are_heard() -> bool:
            """Since they were started again: until then they are known where they were."""
            return all(each.last_heartbeat_ms > before[each.id] for each in cluster.status().nodes)

        wait_for("the nodes to be heard", are_heard)
        wait_for("all to be up", lambda: all(each.state == "up" for each in cluster.health(volume).replicas))
        found = scrub(cluster, volume)
        assert sorted(each["outcome"] for each in found["replicas"]) == ["repaired", "sound", "sound"]
        assert [each["extents_compared"] for each in found["replicas"]] == [1, 1, 1]
        assert sum(each["bad_blocks_repaired"] for each in found["replicas"]) == 1
        assert {each["outcome"] for each in scrub(cluster, volume)["replicas"]} == {"sound"}
        assert read(cluster.attach(volume), 3 * MIB, MIB) == content
