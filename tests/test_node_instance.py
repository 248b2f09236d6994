"""A node is one process at a time, also where somebody copied its data directory."""

import dataclasses
import shutil
from pathlib import Path

from blockstore.config import EXIT_DO_NOT_RESTART, arguments_of
from tests.cluster import CAIRN, NODE, Cluster
from tests.daemons import Daemon, wait_for


def copy_of(cluster: Cluster, index: int, directory: Path) -> Daemon:
    """A node on a copy of another one's data."""
    shutil.copytree(cluster.data_of(index), directory)
    settings = dataclasses.replace(
        NODE, data=directory, zone="a", listen="127.0.0.1:0", control=cluster.control_address
    )
    return Daemon("copy", [CAIRN, "node", "run", *arguments_of(settings)], directory, directory.with_suffix(".log"))


def test_of_two_processes_with_one_nodes_data_the_one_that_registered_last_goes_on(tmp_path: Path) -> None:
    with Cluster(tmp_path, zones=("a",), front_ends=0) as cluster:
        (node,) = cluster.nodes
        node.kill()
        copy = copy_of(cluster, 0, tmp_path / "copy")
        cluster.start(node)
        wait_for("the node to be heard again", lambda: addresses(cluster) == [node.read_address()])
        copy.start()
        try:
            wait_for("the older process to end", lambda: not node.running)
            assert node.stop() == EXIT_DO_NOT_RESTART, "or its supervisor would start it, and end the other"
            assert "only the newer data may be started" in node.tail()
            wait_for("only the copy to be heard", lambda: addresses(cluster) == [copy.read_address()])
            assert copy.stop() == 0
        finally:
            copy.kill()


def addresses(cluster: Cluster) -> list[str]:
    return [each.address for each in cluster.status().nodes if each.up]
