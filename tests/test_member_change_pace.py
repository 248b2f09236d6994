"""How soon the steps of a change of members follow each other: as soon as what they wait for is so."""

import dataclasses
import time
from pathlib import Path
from typing import Final

import pytest

from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.daemons import wait_for

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(300)]

HEARTBEAT_S: Final = 10.0
#: Control looks by itself once a minute, and a front-end speaks seldom: that it is to fill a newcomer it hears with one
#: heartbeat. That the newcomer is whole, that it is a member, and that this has settled would be the next three.
SLOW_CONTROL: Final = dataclasses.replace(CONTROL, reconcile_s=60.0, lease_s=10 * HEARTBEAT_S)
SLOW_FRONT_END: Final = dataclasses.replace(FRONT_END, heartbeat_s=HEARTBEAT_S)


def test_steps_wait_for_no_heartbeat(tmp_path: Path) -> None:
    cluster = Cluster(
        tmp_path, zones=("a", "b", "c", "d"), control_settings=SLOW_CONTROL, front_end_settings=SLOW_FRONT_END
    )
    with cluster:
        volume = cluster.create(8 * MIB)
        cluster.attach(volume)

        def all_up() -> bool:
            health = cluster.health(volume)
            return health.serving == "serving" and all(each.state == "up" for each in health.replicas)

        def configuration() -> control_pb2.Configuration:
            return cluster.volume(volume).segments[0].configuration

        wait_for("its front-end to say that all is well", all_up, 6 * HEARTBEAT_S)
        before = configuration()
        leaving = before.members[0].node
        began = time.monotonic()
        cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=leaving))
        wait_for("it to leave", lambda: configuration().number == before.number + 2, 20 * HEARTBEAT_S)
        assert time.monotonic() - began < 3 * HEARTBEAT_S
        assert leaving not in {member.node for member in configuration().members}
