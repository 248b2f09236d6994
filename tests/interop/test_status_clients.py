"""Real clients that ask what blocks are: maps, sparse copies, and changes since a snapshot.

Over a whole cluster, and, for what takes space only, over a volume in memory.
"""

import dataclasses
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockstore.rpc import snapshot_pb2
from blockstore.units import GIB, KIB, MIB
from tests.cluster import FRONT_END, Cluster
from tests.daemons import wait_for
from tests.interop import clients
from tests.interop.newer_libnbd import run_newer
from tests.loopback import free_address
from tests.metrics_page import scrape
from tests.programs import find_program, require_programs
from tests.test_nbd_interop import serving

pytestmark = pytest.mark.timeout(600)
SIZE = 128 * MIB
Mapped = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_programs("nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "nbdkit")
    settings = dataclasses.replace(FRONT_END, metrics="127.0.0.1:0")
    with Cluster(tmp_path_factory.mktemp("cluster"), snapshotds=1, front_end_settings=settings) as running:
        yield running


def nbd_map(uri: str, context: str = "base:allocation") -> Mapped:
    """Offset, length and flags of each extent."""
    told = json.loads(clients.run("nbdinfo", f"--map={context}", "--json", uri))
    return [(each["offset"], each["length"], each["type"]) for each in told]


def gaps(mapped: Mapped, size: int = SIZE) -> Mapped:
    """What is between extents that are listed, which is all of them."""
    assert sum(length for _, length, _ in mapped) == size
    return [each for each in mapped if each[2]]


def test_maps_copies_and_changes(cluster: Cluster, tmp_path: Path) -> None:
    volume = cluster.create(SIZE)
    uri = cluster.attach(volume)
    assert nbd_map(uri) == [(0, SIZE, 3)]
    clients.run_qemu_io(uri, ["write -P 1 1M 64k", "write -P 2 100M 1M", "write -z 2M 1M"])
    assert nbd_map(uri) == [
        (0, MIB, 3),
        (MIB, 64 * KIB, 0),
        (MIB + 64 * KIB, 99 * MIB - 64 * KIB, 3),
        (100 * MIB, MIB, 0),
        (101 * MIB, 27 * MIB, 3),
    ]
    request = snapshot_pb2.CreateSnapshotRequest(volumes=[volume], tags={"Name": "before"})
    (snapshot,) = cluster.call("CreateSnapshot", request).snapshots
    wait_for("the snapshot", lambda: cluster._is_completed(snapshot.id))
    clients.run_qemu_io(uri, ["write -P 3 1M 4k", "write -P 4 50M 8k", "discard 100M 512k"])
    changed = [(MIB, 4 * KIB, 1), (50 * MIB, 8 * KIB, 1), (100 * MIB, 512 * KIB, 1)]
    for name in (snapshot.id, "before"):
        assert gaps(nbd_map(uri, f"cairn:dirty:{name}")) == changed
    depths = [each for each in nbd_map(uri, "qemu:allocation-depth") if each[2]]
    assert [each for each in depths if each[0] < 100 * MIB] == [
        (MIB, 4 * KIB, 1),
        (MIB + 4 * KIB, 60 * KIB, 2),
        (50 * MIB, 8 * KIB, 1),
    ]
    assert (100 * MIB + 512 * KIB, 512 * KIB, 2) in depths
    assert nbd_map(uri, "cairn:hydrated") == [(0, SIZE, 1)]
    listed = json.loads(clients.run("nbdinfo", "--json", uri))["exports"][0]["contexts"]
    assert set(listed) == {"base:allocation", "qemu:allocation-depth", "cairn:hydrated", f"cairn:dirty:{snapshot.id}"}
    with pytest.raises(AssertionError, match="does not support metadata context"):
        nbd_map(uri, "cairn:dirty:nobody")
    _copies(uri, tmp_path)


def _copies(uri: str, directory: Path) -> None:
    """Sparse files by each copier; what they hold is what is there, directly and through nbdkit's filters."""
    for number, copy in enumerate(
        (
            ["nbdcopy", uri, "{}"],
            ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, "{}"],
        )
    ):
        image = directory / f"copy-{number}.img"
        clients.run(*(each.replace("{}", str(image)) for each in copy))
        assert image.stat().st_size == SIZE
        assert image.stat().st_blocks * 512 < 4 * MIB, "holes stay holes"
        clients.run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(image))
    told = json.loads(clients.run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    assert sum(each["length"] for each in told if each["data"]) == 64 * KIB + 8 * KIB + 512 * KIB
    with _through_nbdkit(uri) as filtered:
        assert [each for each in nbd_map(filtered) if not each[2]] == [each for each in nbd_map(uri) if not each[2]]
        clients.run("qemu-img", "compare", "-f", "raw", "-F", "raw", filtered, str(directory / "copy-0.img"))
        clients.run_qemu_io(filtered, ["write -P 9 60M 100k", "read -P 9 60M 100k", "write -z 60M 100k"])


@contextmanager
def _through_nbdkit(uri: str) -> Iterator[str]:
    """nbdkit as a client, below filters that use block status, zeroes and cache requests."""
    host, port = free_address().split(":")
    nbdkit = find_program("nbdkit")
    assert nbdkit is not None
    filters = ["--filter=fua", "--filter=cow"]
    command = [nbdkit, "--foreground", "--ipaddr", host, "--port", port, *filters, "nbd", f"uri={uri}"]
    with subprocess.Popen(command) as process:
        try:
            wait_for("nbdkit to answer", lambda: _answers(f"nbd://{host}:{port}"))
            yield f"nbd://{host}:{port}"
        finally:
            process.kill()


def _answers(uri: str) -> bool:
    return subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=False, timeout=60).returncode == 0


def test_extended_headers_with_a_newer_libnbd(tmp_path: Path) -> None:
    """Requests of more than 4 GiB, status of some contexts, chunks; nbdinfo and nbdcopy of that release."""
    with serving("--size", "6G", "--tcp", "127.0.0.1:0") as (root,):
        uri = f"{root}/disk"
        assert "using extended packets" in run_newer("nbdinfo", uri)
        run_newer("python3", str(Path(__file__).parent / "newer_libnbd_client.py"), uri)
    with serving("--size", "64M", "--tcp", "127.0.0.1:0") as (root,):
        uri = f"{root}/disk"
        clients.run_qemu_io(uri, ["write -P 5 10M 1M"])
        told = json.loads(run_newer("nbdinfo", "--map", "--json", uri))
        assert [(each["offset"], each["length"], each["type"]) for each in told] == [
            (0, 10 * MIB, 3),
            (10 * MIB, MIB, 0),
            (11 * MIB, 53 * MIB, 3),
        ]
        image = tmp_path / "copy.img"
        run_newer("nbdcopy", uri, str(image))
        assert image.stat().st_blocks * 512 < 2 * MIB
        clients.run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(image))


def test_a_sparse_volume_in_a_few_requests(cluster: Cluster) -> None:
    """A whole TiB, of several segments; the front-end counts what it is asked.

    With extended headers its map is one question. Without, it is one for each 4 GiB, and one more: that much at once
    may not quite be asked for. A copier reads what there is, and nothing else.
    """
    volume = cluster.create(1024 * GIB)
    uri = cluster.attach(volume)
    assert len(cluster.volume(volume).segments) > 1
    clients.run_qemu_io(uri, ["write -P 1 700G 4k", "write -P 2 1023G 64k"])

    def asked(*command: str, newer: bool = False) -> tuple[str, Counter[str]]:
        """What a client printed, and how many requests of each command it took."""
        before = _counted(cluster, volume)
        printed = run_newer(*command) if newer else clients.run(*command)
        return printed, _counted(cluster, volume) - before

    for newer, most in ((True, 1), (False, 1024 // 4 + 1)):
        told, count = asked("nbdinfo", "--map", "--json", uri, newer=newer)
        extents = [(each["offset"], each["length"], each["type"]) for each in json.loads(told)]
        assert [each for each in extents if not each[2]] == [(700 * GIB, 4 * KIB, 0), (1023 * GIB, 64 * KIB, 0)]
        assert count.keys() == {"block_status"}
        assert count["block_status"] <= most
    _, count = asked("nbdcopy", uri, "null:", newer=True)
    assert count["read"] == 2


def _counted(cluster: Cluster, volume: str) -> Counter[str]:
    """The requests of each command that have ended, since the volume was attached."""
    found = scrape(cluster.front_ends[0]).find("cairn_nbd_commands_total", volume=volume)
    return Counter({each.labels["command"]: int(each.value) for each in found})
