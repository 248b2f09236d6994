"""The state directory: its lock, its plan, and how commands find control through it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockstore.cli.control_address import find_control
from blockstore.cli.plan import Wishes, make_plan
from blockstore.cli.state_directory import StateDirectory
from blockstore.config import DEFAULT_CONTROL
from blockstore.errors import Conflict, Corrupt

PLAN = make_plan(None, Wishes(control_port=0, nbd_port=0))


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    made = StateDirectory(tmp_path / "deep" / "state")
    made.make()
    return made


def test_it_is_nobody_elses(directory: StateDirectory) -> None:
    assert directory.path.stat().st_mode & 0o077 == 0


def test_a_plan_is_read_as_it_was_written(directory: StateDirectory) -> None:
    assert directory.read_plan() is None
    directory.write_plan(PLAN)
    assert directory.read_plan() == PLAN


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"control": "x", "nbd": "y", "front_end": "z", "nodes": [1]}'])
def test_a_broken_plan_is_no_new_cluster(directory: StateDirectory, text: str) -> None:
    (directory.path / "cluster.json").write_text(text)
    with pytest.raises(Corrupt, match=r"cluster\.json"):
        directory.read_plan()


def test_one_cluster_a_directory(directory: StateDirectory) -> None:
    assert directory.supervisor() is None
    with directory.locked():
        assert directory.supervisor() == os.getpid()
        with pytest.raises(Conflict, match=f"pid {os.getpid()}"), directory.locked():
            pass
    assert directory.supervisor() is None
    with directory.locked():
        assert directory.supervisor() == os.getpid()


def test_the_lock_goes_with_a_killed_process(directory: StateDirectory) -> None:
    script = (
        "import sys, pathlib; from blockstore.cli.state_directory import StateDirectory\n"
        "with StateDirectory(pathlib.Path(sys.argv[1])).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, directory.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert directory.supervisor() == holder.pid
    holder.kill()
    holder.communicate()
    assert directory.supervisor() is None
    with directory.locked():
        assert directory.supervisor() == os.getpid()


def test_control_is_found(directory: StateDirectory) -> None:
    assert find_control(None, directory.path) == DEFAULT_CONTROL
    assert find_control(None, directory.path / "missing") == DEFAULT_CONTROL
    directory.write_plan(PLAN)
    assert find_control(None, directory.path) == PLAN.control
    assert find_control("host:1", directory.path) == "host:1"


def test_processes(directory: StateDirectory) -> None:
    assert directory.read_processes() == {}
    directory.write_processes({"node-1": 17})
    assert directory.read_processes() == {"node-1": 17}
