"""A real Linux kernel's ext4 under load: snapshots with and without freezing, restored, mounted while they hydrate."""

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path

import grpc
import pytest

from blockstore.cli.daemons import CAIRN
from blockstore.rpc import snapshot_pb2
from blockstore.units import KIB, MIB
from tests.cluster import SNAPSHOTD, Cluster
from tests.conftest import forget_s3
from tests.daemons import wait_for
from tests.linux_host.guest import require_kernel, running, script
from tests.linux_host.kernel import Kernel, Series
from tests.linux_host.machine import Machine
from tests.programs import find_program, require_programs
from tests.s3_server import running_own_server

pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(700)]

SIZE = 256 * MIB
FILES = 24
#: Of these the snapshot must have all that were synced before it was asked for.
SYNCED = 12
LIMIT_S = 300
#: So slow that the guest is done before the background pass.
RATE = 2 * MIB
#: So slow that most is absent when the object store goes away.
SLOW = 64 * KIB
HYDRATED_LIMIT_S = 120


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Debian 12's."""
    return require_kernel(Series.LINUX_6_1)


def bring_the_rest(cluster: Cluster, volume: str) -> None:
    """At full speed what the guest has not read, if there is any."""
    try:
        cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=volume, rate_bytes=0))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
            raise


def wait_hydrated(cluster: Cluster, volume: str) -> None:
    wait_for("it to be hydrated", lambda: not cluster.volume(volume).HasField("source"), HYDRATED_LIMIT_S)


def snapshot_under_load(cluster: Cluster, kernel: Kernel, directory: Path) -> tuple[str, int]:
    """A snapshot in the middle of a guest's work, without freezing: its id, how many files were synced before it."""
    volume = cluster.create(SIZE)
    uri = cluster.attach(volume)
    with running(kernel, script("load", FILES=FILES), directory, uri, LIMIT_S) as loaded:
        loaded.wait_for(rf"SYNCED {SYNCED}\b")
        synced = len(loaded.said(r"SYNCED \d+"))
        (snapshot,) = cluster.snapshot(volume, wait=False)
    result = loaded.end()
    assert result.status == 0, str(result)
    cluster.wait_completed(snapshot, LIMIT_S)
    cluster.detach(volume)
    return snapshot, synced


def test_a_snapshot_under_load_mounts_while_it_hydrates(kernel: Kernel, tmp_path: Path) -> None:
    with Cluster(tmp_path, snapshotds=1) as cluster:
        snapshot, synced = snapshot_under_load(cluster, kernel, tmp_path / "load")
        restored = cluster.restore(snapshot, SLOW)
        where = cluster.attach(restored)
        text = script("recovered", AT_LEAST=synced)
        with running(kernel, text, tmp_path / "recovered", where, LIMIT_S) as mounted:
            mounted.wait_for("MOUNTED")
            assert cluster.volume(restored).HasField("source"), "it was hydrated before it was mounted"
            cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=restored, rate_bytes=RATE))
            # Nobody serves the source for a while: what is there goes on working, the rest waits.
            cluster.snapshotds[0].kill()
            cluster.start(cluster.snapshotds[0])
        assert_clean(mounted)
        bring_the_rest(cluster, restored)
        wait_hydrated(cluster, restored)


def test_the_object_store_goes_away_while_a_mounted_volume_hydrates(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real S3 server, killed and started again: what has come is read meanwhile, the rest waits, no read fails."""
    forget_s3(monkeypatch)
    (tmp_path / "s3").mkdir()
    with running_own_server(tmp_path / "s3") as server:
        for name, value in server.server.environment.items():
            monkeypatch.setenv(name, value)
        where = server.server.settings()
        settings = dataclasses.replace(
            SNAPSHOTD, store=where.url, s3_endpoint=where.s3_endpoint, s3_region=where.s3_region
        )
        with Cluster(tmp_path, snapshotds=1, snapshotd_settings=settings) as cluster:
            snapshot, synced = snapshot_under_load(cluster, kernel, tmp_path / "load")
            # It has what it has shipped in its memory.
            cluster.snapshotds[0].stop()
            cluster.start(cluster.snapshotds[0])
            restored = cluster.restore(snapshot, SLOW)
            uri = cluster.attach(restored)
            text = script("source_away", AT_LEAST=synced)
            with running(kernel, text, tmp_path / "away", uri, LIMIT_S) as mounted:
                mounted.wait_for("MOUNTED")
                server.stop()
                cluster.call("SetHydration", snapshot_pb2.SetHydrationRequest(volume=restored, rate_bytes=0))
                mounted.tell("gone")
                mounted.wait_for("HERE")
                mounted.wait_for("WAITING")
                assert cluster.volume(restored).HasField("source"), "it was hydrated without its object store"
                server.start()
                mounted.tell("back")
            assert_clean(mounted)
            wait_hydrated(cluster, restored)


def assert_clean(mounted: Machine) -> None:
    result = mounted.end()
    assert result.status == 0, str(result)
    assert "CLEAN" in result.output


# ---- frozen

#: Far more than are written until the snapshot is there.
MOST_FILES = 1500
WRITTEN = 20
HOOK_LIMIT_S = 200


def test_hooks_that_freeze_the_file_system_make_a_snapshot_that_needs_no_recovery(
    kernel: Kernel, tmp_path: Path
) -> None:
    """`--pre` and `--post` reach into the guest: what was written there without a sync is in the snapshot as well."""
    require_programs("e2fsck")
    with Cluster(tmp_path, snapshotds=1) as cluster:
        volume = cluster.create(SIZE)
        uri = cluster.attach(volume)
        text = script("freezing", MOST_FILES=MOST_FILES)
        with running(kernel, text, tmp_path / "frozen", uri, LIMIT_S) as loaded:
            loaded.wait_for(rf"WRITTEN {WRITTEN}\b")
            (hot,) = cluster.snapshot(volume, wait=False)
            written = create_frozen(cluster, volume, loaded)
            # It goes on where it stood.
            loaded.wait_for(rf"WRITTEN {written + 5}\b")
            loaded.tell("end")
        result = loaded.end()
        assert result.status == 0, str(result)
        assert result.output.index("FROZEN") < result.output.index("THAWED")
        cluster.detach(volume)
        frozen = newest_snapshot(cluster, volume)
        cluster.wait_completed(hot, LIMIT_S)
        assert needs_recovery(cluster, hot, tmp_path), "this shows nothing: a mounted file system seems clean"
        assert not needs_recovery(cluster, frozen, tmp_path)
        at = cluster.attach(cluster.restore(frozen, RATE))
        with running(kernel, script("thawed", AT_LEAST=written), tmp_path / "thawed", at, LIMIT_S) as mounted:
            pass
        assert_clean(mounted)


def create_frozen(cluster: Cluster, volume: str, loaded: Machine) -> int:
    """By the command line, with hooks that speak to the guest; how many files it had written when it was frozen."""
    words, output = (shlex.quote(str(path)) for path in (loaded.words, loaded.output))

    def hook(word: str, answer: str) -> str:
        return f"echo {word} >{words}; until grep -q {answer} {output}; do sleep 0.05; done"

    argv = [*CAIRN, "snapshot", "create", volume, "--wait", "--hook-timeout", str(HOOK_LIMIT_S)]
    argv += ["--pre", hook("freeze", "FROZEN"), "--post", hook("thaw", "THAWED")]
    environment = os.environ | {"CAIRN_CONTROL": cluster.control_address}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    before, _, _ = loaded.output.read_text(errors="replace").partition("FROZEN")
    return before.count("WRITTEN ")


def newest_snapshot(cluster: Cluster, volume: str) -> str:
    listed = cluster.call("ListSnapshots", snapshot_pb2.ListSnapshotsRequest(volume=volume))
    return str(max(listed.snapshots, key=lambda each: each.generation).id)


def needs_recovery(cluster: Cluster, snapshot: str, directory: Path) -> bool:
    """Whether the file system in a snapshot has a journal to be replayed, as e2fsck sees it; else it must be clean."""
    image = directory / f"{snapshot}.raw"
    environment = os.environ | {"CAIRN_CONTROL": cluster.control_address}
    subprocess.run([*CAIRN, "snapshot", "export", snapshot, image], env=environment, check=True, capture_output=True)
    checked = subprocess.run(
        [str(find_program("e2fsck")), "-f", "-n", image], capture_output=True, text=True, check=False
    )
    said = checked.stdout + checked.stderr
    if "skipping journal recovery" in said:
        return True
    assert checked.returncode == 0, said
    return False
