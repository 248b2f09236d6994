"""The disk that loses its power keeps what was synced, and only what POSIX lets it keep of the rest."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.faults.power import Loss, PowerDisk
from tests.faults.shim import Conditions, Steering
from tests.programs import require_programs

SEEDS = 20
INSTANT = Conditions(real_syncs=0)


@pytest.fixture
def disk(tmp_path: Path) -> PowerDisk:
    require_programs("gcc")
    return PowerDisk(tmp_path / "disk", tmp_path / "scratch")


def run(disk: PowerDisk, script: str, *, conditions: Conditions = INSTANT) -> str:
    """Run it in the disk's root under the shim; what it printed."""
    steering = Steering(disk.root.parent / "steering", conditions)
    prelude = "import os, time\nfrom pathlib import Path\n" + textwrap.dedent(
        """
        def sync(path):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        """
    )
    environment = os.environ | steering.environment | disk.environment
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        cwd=disk.root,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.stdout


def left(disk: PowerDisk, loss: Loss, seed: int = 1) -> dict[str, bytes]:
    """The files after a cut, by name."""
    disk.cut(random.Random(seed), loss)
    return {str(path.relative_to(disk.root)): path.read_bytes() for path in disk.root.rglob("*") if path.is_file()}


def test_what_was_not_synced_is_gone(disk: PowerDisk) -> None:
    run(
        disk,
        """
        Path("kept").write_bytes(b"old")
        sync("kept")
        Path("name-only").write_bytes(b"content")
        sync(".")
        Path("no-name").write_bytes(b"content")
        sync("no-name")
        with open("kept", "r+b") as file:
            file.write(b"new")
        """,
    )
    assert left(disk, Loss.ALL) == {"kept": b"old", "name-only": b""}


def test_a_kill_loses_nothing(disk: PowerDisk) -> None:
    run(disk, 'Path("folder").mkdir(); Path("folder/file").write_bytes(b"content"); os.rename("folder", "other")')
    assert left(disk, Loss.NONE) == {"other/file": b"content"}
    assert left(disk, Loss.ALL) == {"other/file": b"content"}, "what a cut kept is durable"


def test_a_rename_is_kept_as_a_whole_or_not_at_all(disk: PowerDisk) -> None:
    run(disk, 'Path("a").write_bytes(b"1"); sync("a"); Path("b").write_bytes(b"2"); sync("b"); sync(".")')
    assert left(disk, Loss.ALL) == {"a": b"1", "b": b"2"}
    run(disk, 'os.rename("a", "b")')
    assert left(disk, Loss.ALL) == {"a": b"1", "b": b"2"}
    run(disk, 'os.rename("a", "b"); sync("."); os.unlink("b")')
    assert left(disk, Loss.ALL) == {"b": b"1"}


def test_unsynced_writes_are_lost_each_by_itself_and_synced_ones_never(disk: PowerDisk) -> None:
    script = """
        descriptor = os.open("file", os.O_RDWR | os.O_CREAT)
        os.pwrite(descriptor, b"s" * 4096, 0)
        os.fsync(descriptor)
        sync(".")
        for at in range(1, 9):
            os.pwrite(descriptor, b"u" * 4096, at * 4096)
        """
    shown = set()
    for seed in range(SEEDS):
        run(disk, "Path('file').unlink(missing_ok=True)\n" + textwrap.dedent(script))
        content = left(disk, Loss.SOME, seed)["file"]
        assert content[:4096] == b"s" * 4096
        shown.add(tuple(content[at * 4096 : at * 4096 + 1] == b"u" for at in range(1, 9)))
    assert len(shown) > SEEDS // 2
    assert any(not all(each) and sorted(each, reverse=True) != list(each) for each in shown), (
        "a later one without an earlier"
    )


def test_a_torn_write_shows_whole_sectors(disk: PowerDisk) -> None:
    torn = 0
    for seed in range(SEEDS):
        run(disk, 'Path("file").write_bytes(b"o" * 4096); sync("file"); sync(".")')
        run(disk, 'd = os.open("file", os.O_RDWR); os.pwrite(d, b"n" * 4096, 0)')
        content = left(disk, Loss.TORN, seed)["file"]
        sectors = [content[at : at + 512] for at in range(0, 4096, 512)]
        assert all(len(set(each)) == 1 for each in sectors)
        torn += len(set(sectors)) == 2
    assert torn > SEEDS // 2


def test_a_write_through_a_synchronous_descriptor_is_kept(disk: PowerDisk) -> None:
    run(
        disk,
        """
        Path("file").write_bytes(bytes(16384))
        sync("file")
        sync(".")
        plain, durable = os.open("file", os.O_RDWR), os.open("file", os.O_RDWR | os.O_DSYNC)
        os.pwrite(plain, b"lost", 8192)
        os.pwrite(durable, b"kept", 0)
        """,
    )
    content = left(disk, Loss.ALL)["file"]
    assert (content[:4], content[8192:8196]) == (b"kept", bytes(4))


def test_a_sync_that_had_not_ended_promises_nothing(disk: PowerDisk) -> None:
    script = """
        import signal, threading
        descriptor = os.open("file", os.O_RDWR)
        os.pwrite(descriptor, b"content", 0)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        os.fsync(descriptor)
        """
    run(disk, 'Path("file").touch(); sync("file"); sync(".")')
    slow = Conditions(sync_least_us=20_000_000, sync_most_us=20_000_000, real_syncs=0)
    with pytest.raises(subprocess.CalledProcessError):
        run(disk, script, conditions=slow)
    assert left(disk, Loss.ALL) == {"file": b""}


def test_the_clock_and_the_disk_obey(tmp_path: Path) -> None:
    require_programs("gcc")
    steering = Steering(
        tmp_path / "steering",
        Conditions(clock_offset_ns=3_600_000_000_000, sync_least_us=300_000, sync_most_us=300_000),
    )
    script = """
import os, time
wall, steady = time.time(), time.monotonic()
descriptor = os.open("file", os.O_RDWR | os.O_CREAT)
os.fdatasync(descriptor)
print(wall, time.monotonic() - steady)
"""
    before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | steering.environment, check=True,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip

    wall, took = map(float, done.stdout.split())
    assert before < wall - 3600 < time.time()
    assert 0.3 <= took < 60


def test_who_a_daemon_is_survives_a_power_cut(disk: PowerDisk) -> None:
    """Their ids, and the directories that they made: without these a daemon does not start, or is another one."""
    script = """
        from blockstore.storage.node_store import NodeStore
        from nbd_server.front_end import front_end_id
        from blockstore.durable_files import make_directory
        from snapshotd.daemon import daemon_id
        store = NodeStore.open(Path("new/node"))
        make_directory(Path("deep/er/snapshotd"))
        print(store.node, front_end_id(Path("new/front-end")), daemon_id(Path("deep/er/snapshotd")))
        """
    before = run(disk, script)
    files = left(disk, Loss.ALL)
    assert {"new/node/node", "new/front-end/id", "deep/er/snapshotd/id"} <= set(files)
    assert run(disk, script) == before
