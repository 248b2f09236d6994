"""What systemd passes and is told: sockets, readiness, unit files; by its own programs where they are installed."""

import configparser
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockstore.cli.main import run
from blockstore.cli.units import unit_names
from blockstore.config import split_address
from blockstore.systemd import notify
from tests.cluster import CAIRN
from tests.daemons import Daemon, wait_for
from tests.loopback import free_address
from tests.programs import require_programs

#: Prints what it was passed, or why it refuses that.
_PASSED = """
import sys
from blockstore.errors import CairnError
from blockstore.systemd import listening_sockets
try:
    found = listening_sockets()
    print([each.getsockname()[1] for each in found], [each.get_inheritable() for each in found], listening_sockets())
except CairnError as error:
    print(error)
"""


def start_with(descriptors: list[int], count: str | None = None, pid: str = "$$") -> str:
    """Run _PASSED as systemd would: the sockets are 3 and what follows."""
    number = len(descriptors) if count is None else count
    script = f'LISTEN_PID={pid} LISTEN_FDS={number} exec "$0" -c "$1"'
    redirections = " ".join(f"{3 + index}<&{each}" for index, each in enumerate(descriptors))
    done = subprocess.run(
        ["bash", "-c", f"{script} {redirections}", sys.executable, _PASSED],
        pass_fds=descriptors, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout


@contextmanager
def high(*sockets: socket.socket) -> Iterator[list[int]]:
    """Descriptors of them that are none of those which systemd would pass."""
    found = [fcntl.fcntl(each, fcntl.F_DUPFD, 64) for each in sockets]
    try:
        yield found
    finally:
        for each in found:
            os.close(each)


def test_passed_sockets_are_taken_once_and_by_whom_they_are_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (one, other)]
        with high(one, other) as both:
            assert start_with(both) == f"{ports} [False, False] []\n"
            assert start_with(both[:1], pid="1") == "[] [] []\n"
            assert "no number" in start_with(both[:1], count="'-1'")
            assert "no socket" in start_with(both[:1], count="2")


def test_what_does_not_listen_is_refused() -> None:
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for each in (idle, datagrams):
            with high(each) as descriptors:
                assert "ListenStream=" in start_with(descriptors)


def test_a_manager_that_is_gone_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


def test_the_front_end_serves_at_sockets_of_systemd_and_says_so(tmp_path: Path) -> None:
    require_programs("systemd-socket-activate")
    address = free_address()
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        state = tmp_path / "nbd"
        activate = ["systemd-socket-activate", "-l", address, "-l", str(path), "-E", "NOTIFY_SOCKET"]
        command = [*activate, "-E", "CAIRN_PARENT", "-E", "PYTHONPATH", str(CAIRN), "nbd", "run", "--state", str(state)]
        daemon = Daemon("nbd", [*command, "--control", "127.0.0.1:1"], state, tmp_path / "log")
        daemon.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        daemon.start()
        try:
            wait_for("both sockets to be there", path.exists)
            with socket.create_connection(split_address(address), 60) as first:  # which starts it
                ready = told.recv(4096).decode()
                assert first.recv(8) == b"NBDMAGIC"
            assert ready.startswith("READY=1\n")
            assert f"nbd://{address} nbd+unix:///?socket={path}" in ready
            daemon.stop()
            assert told.recv(4096) == b"STOPPING=1"
            assert path.exists()  # it is systemd's
        finally:
            daemon.kill()


def test_unit_files_run_this_installation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "system"
    assert run(["units", "--directory", str(directory), "-o", "json"]) == 0
    written = [Path(each) for each in json.loads(capsys.readouterr().out)["files"]]
    assert {each.name for each in written} == set(unit_names())
    assert {"cairn-control.service", "cairn-node@.service", "cairn-nbd.socket"} <= set(unit_names())
    for each in written:
        unit = configparser.RawConfigParser(strict=False, interpolation=None)
        unit.read_string(each.read_text())
        assert "@CAIRN@" not in each.read_text()
        assert each.suffix == ".socket" or unit["Service"]["ExecStart"].startswith("/")
    assert run(["units", "--directory", str(directory)]) == 0  # the same again
    (directory / "cairn-nbd.service").write_text("mine")
    assert run(["units", "--directory", str(directory)]) == 5
    assert (directory / "cairn-nbd.service").read_text() == "mine"
    assert run(["units", "--directory", str(directory), "--force"]) == 0
    assert (directory / "cairn-nbd.service").read_text() != "mine"


def test_systemd_finds_nothing_wrong_with_them(tmp_path: Path) -> None:
    require_programs("systemd-analyze")
    assert run(["units", "--directory", str(tmp_path)]) == 0
    names = [name.replace("@", "@x") for name in unit_names()]
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "cairn" in line]
    assert (ours, done.returncode) == ([], 0), done.stderr
