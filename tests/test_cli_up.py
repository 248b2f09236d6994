"""`cairn up`, `cairn down` and `cairn demo` with all their real processes."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil
import pytest

from blockstore.cli.daemons import CAIRN
from blockstore.cli.state_directory import StateDirectory
from tests.cli_guest import read, write
from tests.daemons import is_gone, wait_for
from tests.loopback import own_host
from tests.metrics_page import DECLARED, Page, fetch

LIMIT_S = 90.0
HOST = own_host()  # where a port stays free while the cluster that had it is down
pytestmark = [pytest.mark.xdist_group("load"), pytest.mark.timeout(400)]


def cairn(*arguments: str | Path, expect: int = 0) -> Any:
    """Run a command; its document, or where it has none, what it said on stderr."""
    done = subprocess.run([*CAIRN, *arguments], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout) if done.stdout.startswith("{") else done.stderr


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDirectory]:
    """A directory that commands use without being told; what runs in it is ended."""
    directory = StateDirectory(tmp_path / "state")
    monkeypatch.setenv("CAIRN_STATE", str(directory.path))
    monkeypatch.delenv("CAIRN_CONTROL", raising=False)
    yield directory
    pid = directory.supervisor()
    if pid is not None:
        os.kill(pid, signal.SIGKILL)  # its children die with it


def up(*arguments: str, expect: int = 0) -> Any:
    return cairn("up", "--detach", "-o", "json", "--host", HOST, "--set", "node.reserve=0", *arguments, expect=expect)


def served(state: StateDirectory) -> str:
    """Create and attach a volume; its URI."""
    cairn("volume", "create", "--size", "16M", "--name", "db", "-o", "json")
    uri: str = cairn("volume", "attach", "db", "-o", "json")["attachment"]["uris"][0]
    return uri


def kill_and_wait(state: StateDirectory, name: str) -> None:
    """Kill a process and wait for the next one of that name."""
    old = state.read_processes()[name]
    os.kill(old, signal.SIGKILL)
    wait_for(f"another {name}", lambda: state.read_processes().get(name, old) != old, LIMIT_S)


def test_a_cluster_stops_and_goes_on_with_its_data(state: StateDirectory) -> None:
    first = up("--control-port", "0", "--nbd-port", "0")
    assert first["supervisor"] == state.supervisor()
    assert [node["zone"] for node in first["nodes"]] == ["zone-1", "zone-2", "zone-3"]
    uri = served(state)
    write(uri, 4096, b"kept" * 1024)
    check_metrics(state, first["metrics"])
    pids = state.read_processes()
    assert set(pids) == {"control", "node-1", "node-2", "node-3", "nbd", "snapshotd"}

    refused = up(expect=5)
    assert str(first["supervisor"]) in refused
    assert "cairn down" in refused

    assert cairn("down", "-o", "json") == {"state": str(state.path), "stopped": True}
    assert all(is_gone(pid) for pid in pids.values())
    assert state.supervisor() is None
    assert "stopping" in state.log("up").read_text()
    assert cairn("down", "-o", "json")["stopped"] is False
    data = state.data("node-1")
    reports = [cairn("node", "check", state.data(f"node-{number}"), "-o", "json") for number in (1, 2, 3)]
    assert [report["problems"] for report in reports] == [[], [], []]
    assert len({report["replicas"][0]["digest"] for report in reports}) == 1

    again = up()
    assert {**again, "supervisor": 0} == {**first, "supervisor": 0}
    wait_for("the volume to be served again", is_serving, LIMIT_S)
    assert read(uri, 4096, 4096) == b"kept" * 1024
    assert str(data) in cairn("node", "check", data, expect=5)  # it runs
    cairn("down")
    check_finds_a_changed_byte(data)


def check_metrics(state: StateDirectory, addresses: dict[str, str]) -> None:
    """Each process serves its own where it was told, and Prometheus is told the same."""
    for name, address in addresses.items():
        kind = "node" if name.startswith("node-") else name
        declared = {metric.name for metric in DECLARED[kind]}
        wait_for(f"metrics of {name}", lambda address=address, declared=declared: names_at(address) & declared, LIMIT_S)  # type: ignore[misc]
    targets = json.loads(state.targets.read_text())
    assert {each["labels"]["process"]: each["targets"] for each in targets} == {
        name: [address] for name, address in addresses.items()
    }


def names_at(address: str) -> set[str]:
    """Of its metrics; none of one that does not listen yet."""
    try:
        return Page(fetch(address)).names
    except URLError:
        return set()


def is_serving() -> bool:
    """The only volume, as control says."""
    done = subprocess.run([*CAIRN, "status", "-o", "json"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and json.loads(done.stdout)["volumes"][0]["serving"] == "serving"


def check_finds_a_changed_byte(data: Path) -> None:
    table = next(data.glob("replicas/*/*.mdb"))
    stored = table.read_bytes()
    assert b"keptkept" in stored
    table.write_bytes(stored.replace(b"keptkept", b"keptkepT"))
    done = subprocess.run([*CAIRN, "node", "check", data, "-o", "json"], capture_output=True, text=True, check=False)
    assert done.returncode == 9
    assert json.loads(done.stdout)["ok"] is False
    assert done.stderr.count("\n") == 1


def test_a_check_of_what_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path) in cairn("node", "check", tmp_path / "nothing", expect=4)


def test_a_killed_process_comes_back(state: StateDirectory) -> None:
    up("--control-port", "0", "--nbd-port", "0")
    uri = served(state)
    for name in ("node-2", "nbd", "control"):
        kill_and_wait(state, name)

    wait_for("the volume to be served", is_serving, LIMIT_S)
    write(uri, 0, b"x" * 4096)
    assert read(uri, 0, 4096) == b"x" * 4096
    assert "was killed by SIGKILL; starts again" in state.log("up").read_text()
    cairn("down")


def test_all_die_with_a_killed_supervisor(state: StateDirectory) -> None:
    supervisor = up("--control-port", "0", "--nbd-port", "0")["supervisor"]
    pids = state.read_processes()
    os.kill(supervisor, signal.SIGKILL)
    wait_for("the end of all", lambda: all(is_gone(pid) for pid in pids.values()), LIMIT_S)
    # The kernel ends the children as it begins to end the supervisor, whose lock goes a little later.
    wait_for("the lock to go", lambda: state.supervisor() is None, LIMIT_S)
    up()
    cairn("down")


def test_in_the_foreground_until_ctrl_c(state: StateDirectory) -> None:
    process = subprocess.Popen(
        [*CAIRN, "up", "--control-port", "0", "--nbd-port", "0", "--host", HOST],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while "Ctrl-C" not in (line := process.stdout.readline()):
            assert line, lines
            lines.append(line)
        text = "".join(lines)
        for part in ("control     listens at", "node-3      is up as", "nbd         is up as", "ready: 3 nodes"):
            assert part in text
        assert f"export CAIRN_STATE={state.path}" in text
        process.send_signal(signal.SIGINT)
        assert process.wait(2 * LIMIT_S) == 0
        rest = process.stdout.read()
        assert (
            rest.index("nbd         stopping") < rest.index("nodes       stopping") < rest.index("control     stopping")
        )
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.communicate()


def test_a_second_ctrl_c_ends_it_at_once(state: StateDirectory) -> None:
    supervisor = up("--control-port", "0", "--nbd-port", "0")["supervisor"]
    pids = state.read_processes()
    stuck = psutil.Process(pids["nbd"])
    stuck.suspend()  # it will not stop when told to
    os.kill(supervisor, signal.SIGTERM)
    wait_for("the stop", lambda: "stopping" in state.log("up").read_text(), LIMIT_S)
    os.kill(supervisor, signal.SIGTERM)
    wait_for("the end", lambda: is_gone(supervisor), LIMIT_S)
    assert "does not stop within" not in state.log("up").read_text(), "it was not waited for"
    wait_for("the end of all", lambda: all(is_gone(pid) for pid in pids.values()), LIMIT_S)


def test_a_process_that_does_not_start_is_told_with_its_last_words(state: StateDirectory) -> None:
    state.make()
    (state.path / "control").write_text("in the way")
    error = up("--control-port", "0", "--nbd-port", "0", expect=1)
    assert "control does not start: cairn: " in error
    assert str(state.log("control")) in error
    assert state.supervisor() is None


def test_a_node_that_does_not_start_keeps_nobody_from_going_on(state: StateDirectory) -> None:
    state.make()
    (state.path / "node-2").write_text("in the way")
    done = subprocess.run(
        [*CAIRN, "up", "-d", "--control-port", "0", "--nbd-port", "0", "--host", HOST],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "node-2 does not start" in done.stdout
    assert len(cairn("node", "list", "-o", "json")["nodes"]) == 2
    cairn("down")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes"),
        (["--zones", "a,b", "--nodes", "3"], "--zones"),
        (["--set", "node.nothing=1"], "nothing"),
        (["--set", "node.listen=127.0.0.1:1"], "cairn up"),
        (["--host", "192.0.2.1"], "192.0.2.1"),
    ],
)
def test_what_makes_no_sense_starts_nothing(state: StateDirectory, arguments: list[str], message: str) -> None:
    error = up(*arguments, expect=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (state.path / "control").exists()


@pytest.mark.parametrize("size", ["1", "4096", "16M1", "1.00001M"])
def test_a_demo_that_makes_no_sense_starts_nothing(state: StateDirectory, size: str) -> None:
    assert "--size" in cairn("demo", "--state", state.path, "--size", size, expect=2)
    assert not state.path.exists()


def test_the_demo_and_the_same_with_tls(state: StateDirectory) -> None:
    """One after the other: both listen where nothing else is said."""
    for tls in (False, True):
        found = cairn("demo", "--state", state.path, "--size", "16M", "--stop", "-o", "json", *["--tls"] * tls)
        assert found["verified"] is True
        assert found["written_bytes"] >= 16 << 20
        assert found["running"] is False
        first, second = found["snapshots"]
        assert (first["state"], second["state"]) == ("completed", "completed")
        assert first["statistics"]["deduplicated_bytes"] == 4 << 20
        assert second["statistics"]["changed_bytes"] == 16 * 4096
        assert (found["restored"]["name"], found["restored"]["source"]) == ("demo-restored", None)
        assert all("pki/demo" in each for each in found["commands"]) == tls
        assert state.supervisor() is None
        shutil.rmtree(state.path)
