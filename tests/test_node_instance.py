"""A node is one process at a time, also where its data was copied; and one cluster's, once it has replicas."""

import dataclasses
import shutil
from contextlib import ExitStack
from pathlib import Path

from blockstore.config import EXIT_DO_NOT_RESTART, arguments_of
from blockstore.log import LogImage
from blockstore.storage.node_store import NodeStore
from tests.cluster import CAIRN, NODE, Cluster
from tests.daemons import Daemon, wait_for
from tests.storage_model import address


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


def test_a_node_with_replicas_is_no_other_clusters(tmp_path: Path) -> None:
    with ExitStack() as stack:
        clusters = []
        for name in ("own", "other"):
            (tmp_path / name).mkdir()
            clusters.append(stack.enter_context(Cluster(tmp_path / name, zones=("a",), front_ends=0)))
        own, other = clusters
        (node,) = own.nodes
        data = own.data_of(0)

        def move_to(cluster: Cluster) -> None:
            node.command[node.command.index("--control") + 1] = cluster.control_address
            node.start()

        node.stop()
        store = NodeStore.open(data)
        store.create_replica(address(1), LogImage()).close()
        store.close()
        move_to(other)
        wait_for("it to be refused", lambda: "start the node with an empty data directory" in node.tail())
        wait_for("the other's own node to be heard alone", lambda: addresses(other) == [other.nodes[0].read_address()])
        node.stop()
        move_to(own)
        wait_for("it to be heard where it belongs", lambda: addresses(own) == [node.read_address()])
        node.stop()
        shutil.rmtree(data / "replicas")
        (data / "cluster.new").mkdir()  # so that it cannot keep the name, as on a full disk
        move_to(other)
        wait_for("it to be taken without replicas", lambda: len(addresses(other)) == 2)
        assert "the cluster's name cannot be kept" in node.tail()
        before = (data / "cluster").read_text()
        (data / "cluster.new").rmdir()
        wait_for("the name to be kept", lambda: (data / "cluster").read_text() != before)
        node.stop()


def addresses(cluster: Cluster) -> list[str]:
    return [each.address for each in cluster.status().nodes if each.up]
