"""`cairn node drain`, `cairn node repair` and `cairn volume rebalance` against a Control service with canned state."""

import json
from collections.abc import Iterator

import pytest

from blockstore.cli.main import run
from blockstore.cli.repair import duration, rebuild_text
from blockstore.rpc import control_pb2 as pb
from tests.cli_control import VOLUME, CannedControl, canned_control, node_id, replica_id


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedControl]:
    with canned_control() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_a_drain_waits_until_the_node_is_empty(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.nodes[0].replicas = 2
    assert run(["node", "drain", node_id(1)]) == 0
    printed = capsys.readouterr()
    assert "2 replicas are left" in printed.err
    assert f"cairn node remove {node_id(1)}" in printed.out


def test_a_drain_need_not_be_waited_for_and_is_taken_back(
    control: CannedControl, capsys: pytest.CaptureFixture[str]
) -> None:
    control.nodes[0].replicas = 2
    assert run(["node", "drain", node_id(1), "--no-wait", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["draining"] is True
    assert run(["node", "list"]) == 0
    assert "up, draining" in capsys.readouterr().out
    assert run(["node", "drain", node_id(1), "--undo"]) == 0
    assert "not drained any more" in capsys.readouterr().out
    assert control.last(pb.DrainNodeRequest).undo


def test_a_drain_that_stands_still_says_why(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.nodes[0].replicas = 1
    control.waits = "no other node is up"
    assert run(["node", "drain", node_id(1)]) == 0
    assert "1 replicas are left; no other node is up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["node", "drain", "nonsense"], 4, "nonsense"),
        (["node", "drain"], 2, "NODE"),
        (["node", "repair", "--replace-after", "-1"], 2, "--replace-after"),
        (["node", "repair", "--replace-after", "soon"], 2, "--replace-after"),
        (["node", "repair", "--replace-after", "nan"], 2, "--replace-after"),
        (["node", "repair", "--rebuild-rate", "fast"], 2, "fast"),
        (["node", "repair", "--rebuilds", "0"], 2, "--rebuilds"),
        (["node", "repair", "--rebuilds", "99999999999999"], 2, "--rebuilds"),
        (["node", "repair", "--rebuilds-per-node", "99999999999999"], 2, "--rebuilds-per-node"),
        (["volume", "rebalance", "nonsense"], 4, "nonsense"),
    ],
)
def test_nonsense_is_refused_with_what_was_wrong(
    control: CannedControl, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, says: str
) -> None:
    assert run(arguments) == code
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", [["node", "drain"], ["node", "repair"], ["volume", "rebalance"]])
def test_each_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert "--output" in capsys.readouterr().out


def test_settings_are_shown_and_only_what_is_given_is_set(
    control: CannedControl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["node", "repair"]) == 0
    assert "64 MiB/s" in capsys.readouterr().out
    assert run(["node", "repair", "--replace-after", "0", "--rebuild-rate", "10M/s", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "replace_after_s": 0,
        "rebuild_rate_bytes": 10 << 20,
        "rebuilds": 8,
        "rebuilds_per_node": 2,
    }
    request = control.last(pb.SetRepairRequest)
    assert request.HasField("replace_after_s")
    assert not request.HasField("rebuilds")


def test_a_plan_is_printed_and_a_dry_run_says_so(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "rebalance"]) == 0
    assert "nothing to move" in capsys.readouterr().out
    control.moves = [
        pb.Move(
            volume=VOLUME, replica=replica_id(1), from_node=node_id(1), to_node=node_id(4), why="load", size_bytes=1
        )
    ]
    assert run(["volume", "rebalance", VOLUME, "--dry-run", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["dry_run"], document["moves"][0]["to_node"]) == (True, node_id(4))
    assert control.last(pb.RebalanceRequest) == pb.RebalanceRequest(volume=VOLUME, dry_run=True)


def test_how_far_a_copy_is_in_one_line() -> None:
    copying = pb.ReplicaHealth(
        state="filling", extents_done=256, extents_total=1024, rate_bytes=64 << 20, seconds_left=12
    )
    assert rebuild_text(copying) == "256 MiB of 1 GiB, 64 MiB/s, 12 s left"
    assert rebuild_text(pb.ReplicaHealth(state="filling")) == "not begun yet"
    assert [duration(seconds) for seconds in (8, 200, 9000)] == ["8 s", "3 min", "2.5 h"]
