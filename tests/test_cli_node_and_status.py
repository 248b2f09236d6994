"""`cairn node list|show|remove` and `cairn status` against a Control service with canned state."""

import json
import signal
import subprocess
from collections.abc import Iterator

import pytest

from blockstore.cli.daemons import CAIRN
from blockstore.cli.main import run
from blockstore.errors import QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from tests.cli_control import (
    VOLUME,
    CannedControl,
    canned_control,
    make_attachment,
    make_node,
    make_volume,
    node_id,
)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedControl]:
    with canned_control() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_list(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.nodes[1] = make_node(2, up=False)
    assert run(["node", "list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["ID", "ZONE", "STATE", "USED", "CAPACITY", "REPLICAS", "ADDRESS"]
    assert [(line[0], line[1], line[2]) for line in lines[1:]] == [
        (node_id(1), "a", "up"), (node_id(2), "b", "down"), (node_id(3), "c", "up")
    ]  # fmt: skip


def test_show(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "show", node_id(1)]) == 0
    assert "25 GiB (25%)" in capsys.readouterr().out
    assert run(["node", "show", node_id(1), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "id": node_id(1),
        "address": "127.0.0.1:7401",
        "zone": "a",
        "up": True,
        "full": False,
        "draining": False,
        "capacity_bytes": 100 << 30,
        "used_bytes": 25 << 30,
        "replicas": 1,
        "last_heartbeat": "2023-11-14T22:13:20.123Z",
    }


def test_show_one_that_is_not_there(control: CannedControl) -> None:
    assert run(["node", "show", node_id(9)]) == 4


def test_remove(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["node", "remove", node_id(2), "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": node_id(2), "removed": True}
    assert [node.id for node in control.nodes] == [node_id(1), node_id(3)]


def test_status_of_a_healthy_cluster(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment())]
    assert run(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "healthy"
    assert next(line for line in lines if line.startswith("db ")).split()[:6] == [
        "db", "serving", node_id(1), "a", "up", "0"
    ]  # fmt: skip


def test_status_says_what_is_degraded_and_why(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment())]
    control.healthy = False
    control.states = ("up", "down", "up")
    control.problems = [
        pb.Problem(severity=pb.SEVERITY_WARNING, subject=VOLUME, message="two zones only"),
        pb.Problem(severity=pb.SEVERITY_DEGRADED, subject=VOLUME, message="one replica is down"),
    ]
    assert run(["status"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("degraded\n")
    assert "one replica is down" in out
    assert "17" in next(line for line in out.splitlines() if node_id(2) in line).split()


def test_status_as_json(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.problems = [pb.Problem(severity=pb.SEVERITY_UNAVAILABLE, subject=VOLUME, message="no quorum")]
    control.healthy = False
    assert run(["status", "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] is False
    assert found["problems"] == [{"severity": "unavailable", "subject": VOLUME, "message": "no quorum"}]
    assert set(found) == {"healthy", "problems", "volumes", "nodes", "front_ends", "controls"}
    (volume,) = found["volumes"]
    assert volume["serving"] is None
    assert volume["replicas"][0]["end"] == {"epoch": 4, "sequence": 100}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_watching_prints_a_document_a_line_until_interrupted(
    control: CannedControl, number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [*CAIRN, "status", "--watch", "-o", "json", "--control", control.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["healthy"] is True
        control.error = QuorumUnavailable("control is busy")
        assert process.stderr.readline() == "cairn: control at " + f"{control.address}: control is busy\n"
        control.error = None
        assert json.loads(process.stdout.readline())["healthy"] is True
        process.send_signal(number)
        assert process.wait(60) == code
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
