"""How soon the steps of a change of members follow each other: as soon as what they wait for is so."""

import dataclasses
import time
from pathlib import Path
from typing import Final

from blockstore.rpc import control_pb2
from blockstore.units import MIB
from tests.cluster import CONTROL, FRONT_END, Cluster
from tests.daemons import wait_for

HEARTBEAT_S: Final = 10.0
#: Control never looks by itself, and a front-end speaks seldom: that it is to fill a newcomer it hears with one
#: heartbeat. That the newcomer is whole, that it is a member, and that this has settled would be the next three.
SLOW_CONTROL: Final = dataclasses.replace(CONTROL, reconcile_s=3600.0, lease_s=10 * HEARTBEAT_S)
SLOW_FRONT_END: Final = dataclasses.replace(FRONT_END, heartbeat_s=HEARTBEAT_S)


def test_steps_wait_for_no_heartbeat(tmp_path: Path) -> None:
    cluster = Cluster(
        tmp_path, zones=("a", "b", "c", "d"), control_settings=SLOW_CONTROL, front_end_settings=SLOW_FRONT_END
    )
    with cluster:
        volume = cluster.create(8 * MIB)
        cluster.attach(volume)

        def configuration() -> control_pb2.Configuration:
            return cluster.volume(volume).segments[0].configuration

        wait_for("its front-end to speak of it", lambda: cluster.health(volume).serving == "serving", 6 * HEARTBEAT_S)
        before = configuration()
        leaving = before.members[0].node
        began = time.monotonic()
        cluster.call("DrainNode", control_pb2.DrainNodeRequest(node=leaving))
        wait_for("it to leave", lambda: configuration().number == before.number + 2, 10 * HEARTBEAT_S)
        assert time.monotonic() - began < 3 * HEARTBEAT_S
        assert leaving not in {member.node for member in configuration().members}
