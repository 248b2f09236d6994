"""A store whose process is killed, and one whose disk is full: what was applied is whole, nothing else is there."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from blockstore.storage.check import check_replica
from blockstore.storage.replica_store import ReplicaStore
from blockstore.storage.tables import FILE_NAME, StorageFailed
from blockstore.units import BLOCK_SIZE, Generation
from tests.crash.small_disk import PRIVATE_MOUNTS
from tests.programs import require_found
from tests.storage_crash import BLOCKS, story
from tests.storage_model import Log, apply, block, new_store, write

ROOT = Path(__file__).parent.parent
LIMIT_S = 60
KILLS = 5


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    seen = 0
    for turn in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.storage_crash", str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None
            for _ in range(2 + 3 * turn):
                seen = int(child.stdout.readline())
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(LIMIT_S)
        store, log = ReplicaStore.open(tmp_path), Log()
        assert store.applied.sequence >= seen
        assert store.mark == store.applied.sequence
        for record in islice(story(log), store.applied.sequence):
            assert record.sequence == log.sequence
        assert store.read(0, BLOCKS) == log.content(0, BLOCKS)
        for generation, pins in log.pins.items():
            if pins:
                assert store.sealed.read(Generation(generation), 0, BLOCKS) == log.content(0, BLOCKS, generation)
        store.close()
        assert check_replica(tmp_path / FILE_NAME).problems == []


def take_no_more_writes(path: Path) -> None:
    """Every descriptor that this process has of the file becomes one that cannot write."""
    readable = os.open(path, os.O_RDONLY)
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        link = Path(f"/proc/self/fd/{descriptor}")
        if descriptor != readable and link.exists() and link.samefile(path):
            os.dup2(readable, descriptor)
    os.close(readable)


def test_after_a_failed_write_nothing_is_changed_any_more(tmp_path: Path) -> None:
    store, log = new_store(tmp_path), Log()
    apply(store, log, [log.record(write(0, block(1)))])
    store.commit([log.record(write(0, *[block(i) for i in range(200)]))])
    take_no_more_writes(tmp_path / FILE_NAME)
    with pytest.raises(StorageFailed):
        store.checkpoint(log.image(), 0)
    with pytest.raises(StorageFailed):
        store.checkpoint(log.image(), 0)
    assert store.read(0, 200) == log.content(0, 200)
    store.close()
    store = ReplicaStore.open(tmp_path)
    assert store.applied.sequence == 1
    assert store.read(0, 2) == block(1) + bytes(BLOCK_SIZE)


def test_a_full_disk_refuses_checkpoints_and_loses_nothing(tmp_path: Path) -> None:
    ways = [
        way for way in PRIVATE_MOUNTS if not subprocess.run([*way, "true"], check=False, capture_output=True).returncode
    ]
    require_found([] if ways else ["the right to mount (root, or user namespaces)"])
    done = subprocess.run(
        [*ways[0], sys.executable, "-m", "tests.storage_full", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.stdout == "all held\n", done.stderr
