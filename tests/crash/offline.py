"""What the replicas of a volume hold, read from their files after all processes have ended."""

from blockstore.control.placement import REPLICAS
from blockstore.storage.check import check_node
from tests.cluster import Cluster


def assert_replicas_agree(cluster: Cluster, volume: str) -> None:
    """Wait until the volume is whole, detach it, stop all, and compare its replicas in every generation that is pinned.

    (One that nobody pins any more is merged away when a replica likes.)

    Every node's data must pass `cairn node check` as well. Raises AssertionError with the difference.
    """
    cluster.wait_whole(volume, idle=True)
    cluster.detach(volume)
    cluster.stop()
    found = {}
    for node in cluster.nodes:
        report = check_node(node.directory)
        assert not report.problems, f"{node.name}: {report.problems}"
        for replica in report.replicas:
            if replica.address.volume == volume:
                found[node.name] = (
                    replica.whole,
                    replica.applied,
                    replica.digest,
                    replica.digests,
                )
    assert len(found) == min(REPLICAS, len(cluster.nodes)), f"replicas of {volume} on {sorted(found)} only"
    assert len(set(map(str, found.values()))) == 1, f"replicas of {volume} differ: {found}"
    assert all(whole for whole, *_ in found.values()), f"replicas of {volume} are not whole: {found}"
