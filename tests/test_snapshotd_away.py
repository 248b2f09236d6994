"""What `cairn status` says of a real snapshotd whose object store is away, and what that does not make in its place."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockstore.cli.daemons import CAIRN
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.loopback import free_address

pytestmark = pytest.mark.timeout(240)


def cairn(cluster: Cluster, *arguments: str | Path) -> Any:
    argv = [*CAIRN, *arguments, "--control", cluster.control_address, "--output", "json"]
    done = subprocess.run(argv, capture_output=True, check=True, timeout=100)
    return json.loads(done.stdout)


def words(cluster: Cluster) -> str:
    """All that the status complains of, of a daemon."""
    problems = cairn(cluster, "status")["problems"]
    return "; ".join(each["message"] for each in problems if each["subject"].startswith("sd-"))


def test_a_store_that_is_away_is_told_and_not_made_again(tmp_path: Path) -> None:
    with Cluster(tmp_path, zones=(), front_ends=0, snapshotds=1) as cluster:
        (daemon,) = cluster.snapshotds
        store, aside = tmp_path / "store", tmp_path / "aside"
        image = tmp_path / "image"
        image.write_bytes(os.urandom(100_000))
        snapshot = cairn(cluster, "snapshot", "import", image)["id"]
        wait_for("nothing to be amiss", lambda: not words(cluster))

        # The disk is not mounted: an empty directory is there in its place.
        daemon.stop()
        store.rename(aside)
        daemon.start()
        wait_for("it to end", lambda: not daemon.running)
        assert "is the disk mounted" in daemon.tail()
        assert not (store / "repository").exists()
        assert not (store / "keys").exists()
        wait_for("the reason to be told", lambda: f"there is no repository in file://{store}" in words(cluster))
        _put_back(store, aside)
        cluster.start(daemon)
        wait_for("it to be well", lambda: not words(cluster))
        assert cairn(cluster, "snapshot", "verify", snapshot)["ok"] is True


def test_a_server_that_does_not_answer_is_waited_for_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    with Cluster(tmp_path, zones=(), front_ends=0, snapshotds=1) as cluster:
        (daemon,) = cluster.snapshotds
        daemon.stop()
        command = list(daemon.command)
        daemon.command = [*command, "--store", "s3://bucket/prefix", "--s3-endpoint", f"http://{free_address()}"]
        daemon.start()
        wait_for("the reason to be told", lambda: "cannot list probe/ in s3://bucket/prefix" in words(cluster))
        assert daemon.running
        daemon.stop()
        daemon.command = command
        cluster.start(daemon)
        wait_for("it to be well", lambda: not words(cluster))


def _put_back(store: Path, aside: Path) -> None:
    """Mount it."""
    for path in sorted(store.rglob("*"), reverse=True):
        path.rmdir()
    store.rmdir()
    aside.rename(store)
