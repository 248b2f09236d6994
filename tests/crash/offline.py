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
    segments = cluster.volume(volume).segments
    members = {each.replica: one.number for one in segments for each in one.configuration.members}
    cluster.detach(volume)
    cluster.stop()
    found: dict[int, dict[str, tuple[object, ...]]] = {one.number: {} for one in segments}
    for node in cluster.nodes:
        report = check_node(node.directory)
        assert not report.problems, f"{node.name}: {report.problems}"
        for each in report.replicas:
            if each.address.replica in members:
                on_node = found[members[each.address.replica]]
                on_node[node.name] = (each.whole, each.applied, each.digest, each.digests)
    for number, replicas in found.items():
        what = f"replicas of segment {number} of {volume}"
        assert len(replicas) == min(REPLICAS, len(cluster.nodes)), f"{what} on {sorted(replicas)} only"
        assert len(set(map(str, replicas.values()))) == 1, f"{what} differ: {replicas}"
        assert all(whole for whole, *_ in replicas.values()), f"{what} are not whole: {replicas}"
