"""Daemons run by the command: found, started, told to stop, refused."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from blockstore.cli.daemon_process import find_daemon
from blockstore.cli.daemons import CAIRN
from blockstore.cli.settings import PARENT_VARIABLE
from blockstore.durable_files import make_directory
from blockstore.errors import InvalidRequest, NotFound
from tests.cli_control import canned_control
from tests.daemons import wait_for


def address_in(state: Path) -> str:
    """Where it listens; empty before it does."""
    file = state / "address"
    return file.read_text().strip() if file.exists() else ""


@pytest.mark.parametrize("name", ["control", "node", "nbd", "snapshotd"])
def test_every_daemon_is_installed(name: str) -> None:
    assert callable(find_daemon(name))


def test_a_daemon_that_is_not() -> None:
    with pytest.raises(NotFound, match="it has control, node"):
        find_daemon("teapot")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_control_alone_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    state = tmp_path / "control"
    with (tmp_path / "log").open("wb") as log:
        control = subprocess.Popen(
            [*CAIRN, "control", "run", "--state", state, "--listen", "127.0.0.1:0"], stdout=log, stderr=log
        )
    try:
        address = wait_for("control", lambda: address_in(state))
        done = subprocess.run(
            [*CAIRN, "volume", "list", "--control", address, "-o", "json"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        control.send_signal(number)
        assert control.wait(60) == 0
    finally:
        control.kill()
        control.wait()
    assert "control listens" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("below", ["", "state"])
def test_a_place_that_can_be_no_directory_is_said_in_one_line(tmp_path: Path, below: str) -> None:
    """It is what a newcomer meets first who is not root, with the directories of the examples."""
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="cannot be a directory for this user"):
        make_directory(tmp_path / "file" / below)


def test_a_directory_that_is_somebody_elses_is_said_in_one_line() -> None:
    before = os.getresuid()
    if before[1] == 0:  # who may write everywhere
        os.setresuid(65534, 65534, 0)
    try:
        with pytest.raises(InvalidRequest, match="Permission denied"):
            make_directory(Path("/etc"))
    finally:
        os.setresuid(*before)


def test_a_daemon_without_a_directory_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = ["nbd", "run", "--state", str(tmp_path / "file"), "--listen", "127.0.0.1:0"]
    done = subprocess.run([*CAIRN, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("cairn: ")
    assert "cannot be a directory" in done.stderr


def test_an_address_in_use_is_refused_in_one_line(tmp_path: Path) -> None:
    with canned_control() as other:
        arguments = ["control", "run", "--state", str(tmp_path / "control"), "--listen", other.address]
        done = subprocess.run([*CAIRN, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 5
    assert other.address in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_daemon_whose_supervisor_is_gone_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT_VARIABLE, "1")
    done = subprocess.run(
        [*CAIRN, "control", "run", "--state", tmp_path / "control"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "is gone" in done.stderr
    assert not (tmp_path / "control").exists()
