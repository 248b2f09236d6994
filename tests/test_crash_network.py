"""The network between the front-end and the nodes fails: connections are lost, or nothing is delivered."""

import dataclasses
import math
from pathlib import Path

import pytest

from blockstore.units import MIB
from tests.cluster import FRONT_END, Cluster
from tests.crash.model import SECTOR_SIZE
from tests.crash.offline import assert_replicas_agree
from tests.crash.workload import Workload
from tests.daemons import wait_for

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

SIZE = 64 * MIB
SECTORS = range(SIZE // SECTOR_SIZE)
PROGRESS = 200
LIMIT_S = 120


def wait_for_beats(cluster: Cluster, count: int) -> None:
    """Until control has heard the front-end so often: by its own clock, at least that many heartbeats have passed."""
    heard: set[int] = set()

    def enough() -> bool:
        heard.update(each.last_heartbeat_ms for each in cluster.status().front_ends)
        return len(heard) > count + 1  # the first one is of before, and the next one may have been on its way

    wait_for(f"{count} heartbeats", enough, LIMIT_S)


def test_a_node_that_is_cut_off_catches_up(tmp_path: Path) -> None:
    with Cluster(tmp_path, proxied=True) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        with Workload(lambda: uri, SECTORS) as load:
            for index, proxy in enumerate(cluster.proxies):
                fail = (proxy.cut, proxy.hold)[index % 2]
                load.wait_progress(PROGRESS)
                fail()
                load.wait_progress(PROGRESS)
                proxy.restore()
                cluster.wait_whole(volume)
        load.verify(uri)
        assert_replicas_agree(cluster, volume)


def test_without_a_quorum_requests_wait_and_then_go_on(tmp_path: Path) -> None:
    patient = dataclasses.replace(FRONT_END, retry_limit_s=2 * LIMIT_S)  # heartbeats may take long to come
    with Cluster(tmp_path, proxied=True, front_end_settings=patient) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        with Workload(lambda: uri, SECTORS) as load:
            load.wait_progress(PROGRESS)
            for proxy in cluster.proxies[:2]:
                proxy.hold()
            # What was on its way has arrived by then, and no lease from before still allows a read.
            wait_for_beats(cluster, math.ceil((FRONT_END.lease_s + FRONT_END.drift_s) / FRONT_END.heartbeat_s) + 1)
            before = load.acknowledged
            wait_for_beats(cluster, 5)
            assert load.acknowledged == before, "acknowledged without a quorum"
            for proxy in cluster.proxies[:2]:
                proxy.restore()
            load.wait_progress(PROGRESS)
        load.verify(uri)
        assert_replicas_agree(cluster, volume)
