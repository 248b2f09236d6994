"""A real Linux kernel's ext4 under load: a snapshot in the middle, restored, mounted while it hydrates."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockstore.config import split_address
from blockstore.rpc import control_pb2, snapshot_pb2
from blockstore.units import MIB
from tests.cluster import Cluster
from tests.daemons import wait_for
from tests.linux_host import guest
from tests.linux_host.kernel import Kernel, fetch_kernel, missing_programs
from tests.programs import require_found, require_programs

# The first test also fetches the kernel's package.
pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]

SIZE = 256 * MIB
FILES = 40
#: Of these the snapshot must have all that were synced before it was asked for.
SYNCED = 12
LIMIT_S = 180
#: So slow that the guest is done before the background pass.
RATE = 2 * MIB


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """Debian's kernel, fetched."""
    require_found(missing_programs())
    require_programs(*guest.NEEDED)
    return fetch_kernel(tmp_path_factory.mktemp("kernel"))


def script(name: str, **variables: int) -> str:
    settings = "".join(f"{name}={value}\n" for name, value in variables.items())
    return settings + (Path(__file__).parent / "linux_host" / f"{name}.sh").read_text()


class Guest:
    """One that runs beside the test. result: once it has ended."""

    def __init__(self, kernel: Kernel, text: str, directory: Path, uri: str) -> None:
        address, _, export = uri.removeprefix("nbd://").partition("/")
        self._output = directory / "output"
        self._results: list[guest.Result] = []
        port = split_address(address)[1]

        def run() -> None:
            self._results.append(guest.run(kernel, text, directory, port=port, export=export, timeout_s=LIMIT_S))

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def said(self, pattern: str) -> list[str]:
        """All that it has said so far that fits."""
        return re.findall(pattern, self._output.read_text(errors="replace")) if self._output.exists() else []

    def wait_for(self, pattern: str) -> None:
        wait_for(f"the guest to say {pattern}", lambda: self.said(pattern) or not self._thread.is_alive(), LIMIT_S)
        assert self.said(pattern), str(self.end())

    def end(self) -> guest.Result:
        self._thread.join()
        return self._results[0]


@contextmanager
def running(kernel: Kernel, text: str, directory: Path, uri: str) -> Iterator[Guest]:
    """A guest, which has ended when this does."""
    started = Guest(kernel, text, directory, uri)
    try:
        yield started
    finally:
        started.end()


def restore(cluster: Cluster, snapshot: str) -> str:
    """The id of a volume made from it, which hydrates slowly."""
    request = control_pb2.CreateVolumeRequest(snapshot=snapshot, init_rate_bytes=RATE)
    volume = cluster.call("CreateVolume", request).id
    wait_for("it to be available", lambda: cluster.volume(volume).state == control_pb2.VOLUME_STATE_AVAILABLE)
    return str(volume)


def test_a_snapshot_under_load_mounts_while_it_hydrates(kernel: Kernel, tmp_path: Path) -> None:
    with Cluster(tmp_path, snapshotds=1) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        with running(kernel, script("load", FILES=FILES), tmp_path / "load", uri) as loaded:
            loaded.wait_for(rf"SYNCED {SYNCED}\b")
            synced = len(loaded.said(r"SYNCED \d+"))
            (snapshot,) = cluster.snapshot(volume)
        result = loaded.end()
        assert result.status == 0, str(result)
        restored = restore(cluster, snapshot)
        where = cluster.attach(restored)
        with running(kernel, script("recovered", AT_LEAST=synced), tmp_path / "recovered", where) as mounted:
            mounted.wait_for("MOUNTED")
            assert cluster.volume(restored).HasField("source"), "it was hydrated before it was mounted"
            # Nobody serves the source for a while: what is there goes on working, the rest waits.
            cluster.snapshotds[0].kill()
            cluster.start(cluster.snapshotds[0])
        result = mounted.end()
        assert result.status == 0, str(result)
        assert "CLEAN" in result.output
        cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=restored, rate_bytes=0))
        wait_for("it to be hydrated", lambda: not cluster.volume(restored).HasField("source"), 120)
