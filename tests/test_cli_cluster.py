"""The cluster of `cairn up` is its own: whoever else listens where its control is to be gets none of its processes."""

import asyncio
import dataclasses
from pathlib import Path

import pytest

from blockstore.cli.cluster import LocalCluster
from blockstore.cli.plan import Wishes, make_plan
from blockstore.cli.screen import Steps
from blockstore.cli.state_directory import StateDirectory
from blockstore.cli.up import parse_overrides
from blockstore.errors import CairnError
from tests.cluster import Cluster
from tests.loopback import own_host


def test_another_clusters_control_at_its_address_gets_no_nodes(tmp_path: Path) -> None:
    """As where two of them are started at once, and both found the port free."""
    (tmp_path / "other").mkdir()
    with Cluster(tmp_path / "other", zones=("a",), front_ends=0) as other:
        (theirs,) = other.status().nodes
        directory = StateDirectory(tmp_path / "own")
        directory.make()
        plan = make_plan(None, Wishes(host=own_host(), nodes=1, control_port=0, nbd_port=0))
        plan = dataclasses.replace(plan, control=other.control_address)
        own = LocalCluster(directory, plan, parse_overrides([]), Steps(None), None)

        async def start() -> None:
            try:
                await own.start()
            finally:
                await own.stop()

        with pytest.raises(CairnError, match="control does not start"):
            asyncio.run(start())
        assert [each.id for each in other.status().nodes] == [theirs.id]
        assert not directory.log("node-1").exists()
