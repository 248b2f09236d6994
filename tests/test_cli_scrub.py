"""`cairn volume scrub`: what it asks for, how it waits, what it says, and its exit codes."""

from collections.abc import Iterator

import pytest

from blockstore.cli.main import run
from blockstore.rpc import control_pb2 as pb
from blockstore.rpc.replica_pb2 import Divergence, ScrubStatus
from tests.cli_control import VOLUME, CannedControl, canned_control, replica_id
from tests.cli_output import DOCS, document, keys_of

SOUND = ScrubStatus(number=7, ended=7, extents_total=4, extents_done=4, extents_compared=4)
UNDER_WAY = ScrubStatus(number=7, running=True, ended=6, extents_total=4, extents_done=2)
REPAIRED = ScrubStatus(number=7, ended=7, extents_done=4, extents_damaged=1)
BAD = ScrubStatus(number=7, ended=7, extents_done=4, extents_damaged=1, extents_bad=1)
DIFFERENCE = Divergence(block=5, generation=(1 << 32) - 1, peer=replica_id(2), sequence=9, what="this and that")
DIFFERS = ScrubStatus(number=8, ended=8, extents_done=4, divergences=[DIFFERENCE], extents_differing=1)


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedControl]:
    with canned_control() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def outcomes(found: dict[str, list[dict[str, str]]]) -> list[str]:
    return [each["outcome"] for each in found["replicas"]]


def test_without_waiting_it_only_begins(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.scrubs = [[UNDER_WAY] * 3]
    assert run(["volume", "scrub", "db", "--rate", "50M", "-o", "json"]) == 0
    assert control.last(pb.ScrubVolumeRequest) == pb.ScrubVolumeRequest(volume="db", rate_bytes=50 << 20)
    found = document(capsys)
    assert (found["volume"], outcomes(found), found["sound"]) == (VOLUME, ["running"] * 3, False)


def test_it_waits_for_this_pass_at_each_replica(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.scrubs = [[UNDER_WAY] * 3, [SOUND, UNDER_WAY, SOUND], [SOUND, REPAIRED, SOUND]]
    assert run(["volume", "scrub", "db", "--wait"]) == 0
    captured = capsys.readouterr()
    assert [line.split()[2] for line in captured.out.splitlines()[1:]] == ["sound", "repaired", "sound"]
    assert "50%" in captured.err


@pytest.mark.parametrize(
    ("scrubs", "expected", "code"),
    [
        ([SOUND, BAD, SOUND], ["sound", "damaged", "sound"], 9),
        ([DIFFERS, SOUND, SOUND], ["differs", "sound", "sound"], 9),
    ],
)
def test_what_stays_wrong_is_exit_code_9(
    control: CannedControl,
    capsys: pytest.CaptureFixture[str],
    scrubs: list[ScrubStatus],
    expected: list[str],
    code: int,
) -> None:
    control.scrubs = [scrubs]
    assert run(["volume", "scrub", "db", "--wait", "-o", "json"]) == code
    captured = capsys.readouterr()
    assert "something stays wrong" in captured.err
    assert all(f'"outcome": "{each}"' in captured.out for each in expected)


@pytest.mark.parametrize(("state", "outcome"), [("down", "not reached"), ("filling", "filling")])
def test_what_could_not_be_scrubbed_is_exit_code_8(
    control: CannedControl, capsys: pytest.CaptureFixture[str], state: str, outcome: str
) -> None:
    control.scrubs, control.states = [[SOUND] * 3], ("up", "up", state)
    assert run(["volume", "scrub", "db", "--wait", "-o", "json"]) == 8
    assert outcomes(document(capsys)) == ["sound", "sound", outcome]


def test_a_replica_where_it_could_not_begin_is_told_with_why(
    control: CannedControl, capsys: pytest.CaptureFixture[str]
) -> None:
    control.scrubs, control.started[2] = [[SOUND] * 3], pb.StartedScrub(replica=replica_id(3), why="not now")
    assert run(["volume", "scrub", "db", "--wait"]) == 8
    assert "not now" in capsys.readouterr().out


def test_every_key_is_documented(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.scrubs = [[DIFFERS] * 3]
    assert run(["volume", "scrub", "db", "--wait", "-o", "json"]) == 9
    found = document(capsys)
    assert sorted(key for key in keys_of(found) if f"`{key}`" not in DOCS) == []
    assert found["replicas"][0]["differences"][0] == {
        "block": 5,
        "byte": 20480,
        "generation": None,
        "peer": replica_id(2),
        "sequence": 9,
        "what": "this and that",
    }
