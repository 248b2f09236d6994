"""Nodes that scrub all the time while everything is killed, and must never find anything: what they found, if so."""

import dataclasses
from typing import Final

from tests.cluster import NODE, Cluster
from tests.daemons import wait_for

#: One pass after the other, as fast as they go.
SCRUBBING: Final = dataclasses.replace(NODE, scrub_every_s=0.2, scrub_rate_bytes=0, upkeep_s=1.0)


def assert_no_alarm(cluster: Cluster) -> None:
    """No scrub found a difference or damage, and there were some."""

    def scrubbed() -> bool:
        replicas = [each for volume in cluster.status().volumes for each in volume.replicas]
        return any(each.scrub.ended for each in replicas)

    wait_for("a scrub to end", scrubbed)
    status = cluster.status()
    for volume in status.volumes:
        for each in volume.replicas:
            found = [f"block {one.block} of {one.generation}: {one.what}" for one in each.scrub.divergences]
            assert found == [], f"{each.replica} of {volume.volume.id} differs: {found}"
            assert (each.bad_blocks_found, each.damage) == (0, ""), f"{each.replica} of {volume.volume.id}: {each}"
