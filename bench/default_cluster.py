"""The cluster that is measured where nothing else is said: three nodes, and every process with its defaults."""

from pathlib import Path

from blockstore.config import ControlSettings, FrontEndSettings, NodeSettings, SnapshotdSettings
from tests.cluster import Cluster


def default_cluster(directory: Path, *, snapshotds: int = 0) -> Cluster:
    """To be entered with `with`. directory: is made where it is missing."""
    directory.mkdir(exist_ok=True)
    return Cluster(
        directory,
        control_settings=ControlSettings(),
        node_settings=NodeSettings(),
        front_end_settings=FrontEndSettings(),
        snapshotds=snapshotds,
        snapshotd_settings=SnapshotdSettings(),
    )
