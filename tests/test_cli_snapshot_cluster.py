"""`cairn snapshot` and its kin against a real cluster: what a user does, from the first snapshot to a lost cluster."""

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockstore.cli.daemons import CAIRN
from tests.cli_guest import read, write
from tests.cluster import CONTROL, KEYRING, SNAPSHOTD, Cluster
from tests.daemons import wait_for

MIB = 1 << 20
pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]

#: Nobody is gone because the machine is busy.
PATIENT = dataclasses.replace(CONTROL, lease_s=15.0)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "cluster").mkdir()
    with Cluster(tmp_path / "cluster", snapshotds=1, control_settings=PATIENT) as running:
        yield running


def cairn(cluster: Cluster, *arguments: str | Path, expect: int = 0, stdin: bytes | None = None) -> Any:
    """Run a command with this cluster; its document, or where it fails, what it said on stderr."""
    environment = os.environ | {"CAIRN_CONTROL": cluster.control_address}
    argv = [*CAIRN, *arguments, "--output", "json"]
    done = subprocess.run(argv, env=environment, input=stdin, capture_output=True, check=False, timeout=200)
    assert done.returncode == expect, done.stderr.decode()
    return json.loads(done.stdout) if expect == 0 else done.stderr.decode()


def content_of(cluster: Cluster, snapshot: str, directory: Path) -> bytes:
    """What an export writes."""
    path = directory / f"{snapshot}.raw"
    cairn(cluster, "snapshot", "export", snapshot, path, "--force")
    return path.read_bytes()


def test_from_a_snapshot_to_a_lost_cluster(cluster: Cluster, tmp_path: Path) -> None:
    volume = cluster.create(16 * MIB, "db")
    uri = cluster.attach(volume)
    expected = bytearray(16 * MIB)
    for offset in (0, 5 * MIB + 4096, 15 * MIB):
        expected[offset : offset + 65536] = data = os.urandom(65536)
        write(uri, offset, data)

    # Taken, between hooks, and waited for.
    log = tmp_path / "log"
    hooks = ["--pre", f"echo pre >> {log}", "--post", f"echo post >> {log}"]
    (first,) = cairn(cluster, "snapshot", "create", "db", "--wait", "-d", "first", *hooks)["snapshots"]
    assert log.read_text().split() == ["pre", "post"]
    assert (first["state"], first["statistics"]["logical_bytes"]) == ("completed", 3 * 65536)
    assert content_of(cluster, first["id"], tmp_path) == bytes(expected)

    # A change, and another one of it.
    write(uri, 5 * MIB + 4096, b"x" * 4096)
    (second,) = cairn(cluster, "snapshot", "create", "db", "--wait")["snapshots"]
    assert second["parent"] == first["id"]
    assert second["statistics"]["changed_bytes"] == 4096
    found = cairn(cluster, "snapshot", "diff", first["id"], second["id"])
    assert found["ranges"] == [{"offset": 5 * MIB + 4096, "size": 4096, "zero": False}]

    restored(cluster, first["id"], bytes(expected), tmp_path)
    assert cairn(cluster, "snapshot", "verify")["ok"] is True
    assert cairn(cluster, "store", "check")["ok"] is True
    freed(cluster, second["id"], first["id"])
    cairn(cluster, "key", "rotate")
    lost(cluster, first["id"], bytes(expected), tmp_path)


def restored(cluster: Cluster, snapshot: str, expected: bytes, directory: Path) -> None:
    """A larger volume made from it shows it, comes to be hydrated, and is a line of the tree once snapshotted."""
    copy = cairn(cluster, "volume", "create", "--snapshot", snapshot, "--name", "copy", "--size", "20M")
    assert copy["size_bytes"] == 20 * MIB
    uri = cluster.attach(copy["id"])
    assert read(uri, 15 * MIB, 65536) == expected[15 * MIB : 15 * MIB + 65536]
    assert read(uri, 16 * MIB, 4096) == bytes(4096)

    def is_hydrated() -> bool:
        return cairn(cluster, "volume", "show", "copy")["source"] is None

    wait_for("copy to be hydrated", is_hydrated)
    assert "has all its blocks" in cairn(cluster, "volume", "hydrate", "pause", "copy", expect=5)
    (third,) = cairn(cluster, "snapshot", "create", "copy", "--wait")["snapshots"]
    assert content_of(cluster, third["id"], directory) == expected.ljust(20 * MIB, b"\0")
    tree = {each["id"]: each for each in cairn(cluster, "snapshot", "tree")["snapshots"]}
    assert (tree[third["id"]]["parent"], tree[third["id"]]["depth"]) == (snapshot, 1)
    assert tree[snapshot]["logical_bytes"] == 3 * 65536
    cairn(cluster, "snapshot", "delete", third["id"])


def freed(cluster: Cluster, deleted: str, kept: str) -> None:
    """What only a deleted snapshot needed is pruned, and the other one is still whole."""
    cairn(cluster, "snapshot", "delete", deleted, "--yes")

    def ids() -> list[str]:
        return [each["id"] for each in cairn(cluster, "snapshot", "list")["snapshots"]]

    wait_for("the deleted ones to go", lambda: ids() == [kept])
    before = cairn(cluster, "store", "stats")
    assert cairn(cluster, "store", "prune", "--dry-run")["bytes_freed"] > 0
    assert cairn(cluster, "store", "stats")["objects"] == before["objects"]
    assert cairn(cluster, "store", "prune")["done"] is True
    assert cairn(cluster, "store", "stats")["stored_bytes"] < before["stored_bytes"]
    assert cairn(cluster, "snapshot", "verify", kept)["ok"] is True


def lost(cluster: Cluster, snapshot: str, expected: bytes, directory: Path) -> None:
    """Object store and keyring are enough for another cluster."""
    cluster.stop()
    key = directory / "backup.json"
    shutil.copy(cluster.directory / "snapshotd-0" / KEYRING, key)
    settings = dataclasses.replace(SNAPSHOTD, store=str(cluster.directory / "store"), keyring_file=key)
    (directory / "another").mkdir()
    with Cluster(directory / "another", snapshotds=1, snapshotd_settings=settings, control_settings=PATIENT) as another:
        assert cairn(another, "snapshot", "list")["snapshots"] == []
        assert "--force" in cairn(another, "store", "adopt", expect=5)
        assert cairn(another, "store", "adopt", "--force")["snapshots"] == [snapshot]
        assert content_of(another, snapshot, directory) == expected


def test_several_volumes_and_an_imported_image(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("a", "b"):
        cluster.attach(cluster.create(8 * MIB, name))
    made = cairn(cluster, "snapshot", "create", "a", "b", "--wait")["snapshots"]
    assert [each["volume_name"] for each in made] == ["a", "b"]
    assert made[0]["barrier"] == made[1]["barrier"] is not None

    image = os.urandom(3 * MIB) + bytes(2 * MIB) + os.urandom(4096)
    (tmp_path / "raw").write_bytes(image)
    by_file = cairn(cluster, "snapshot", "import", tmp_path / "raw", "-d", "golden")
    by_pipe = cairn(cluster, "snapshot", "import", "-", "--size", str(len(image)), stdin=image)
    assert by_pipe["statistics"]["deduplicated_bytes"] == 3 * MIB + 4096
    for each in (by_file, by_pipe):
        assert content_of(cluster, each["id"], tmp_path) == image
    listed = len(cairn(cluster, "snapshot", "list")["snapshots"])
    assert "stdin ended" in cairn(cluster, "snapshot", "import", "-", "--size", "8M", stdin=image, expect=2)
    assert len(cairn(cluster, "snapshot", "list")["snapshots"]) == listed
    copy = cairn(cluster, "volume", "create", "--snapshot", by_file["id"])
    assert read(cluster.attach(copy["id"]), 0, 65536) == image[:65536]
