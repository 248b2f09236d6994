"""`cairn snapshot` as control answers it: requests, tables, documents, waiting."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from blockstore.cli import snapshot_tables
from blockstore.cli.completion import complete_snapshot
from blockstore.cli.main import run
from blockstore.errors import Conflict
from blockstore.rpc import snapshot_pb2 as pb
from tests.cli_output import document
from tests.cli_snapshots import MIB, CannedSnapshots, canned_cluster, make_progress, make_snapshot, snapshot_id

ONE, TWO, THREE = (snapshot_id(n) for n in (1, 2, 3))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedSnapshots]:
    with canned_cluster() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_create(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "create", "db", "-d", "before the upgrade", "--tag", "env=test", "-o", "json"]) == 0
    request = cluster.last(pb.CreateSnapshotRequest)
    assert list(request.volumes) == ["db"]
    assert (request.description, dict(request.tags)) == ("before the upgrade", {"env": "test"})
    assert len(request.client_token) == 32
    (found,) = document(capsys)["snapshots"]
    assert (found["state"], found["completed_at"]) == ("pending", None)


def test_several_volumes_are_one_request(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "create", "db", "log", "--client-token", "t"]) == 0
    request = cluster.last(pb.CreateSnapshotRequest)
    assert (list(request.volumes), request.client_token) == (["db", "log"], "t")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_create_and_wait(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.watched = [make_snapshot(10, pb.SNAPSHOT_STATE_PENDING, progress=make_progress(4 * MIB))]
    assert run(["snapshot", "create", "db", "--wait", "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert f"{snapshot_id(10)}: 4 MiB of 10 MiB (40%), 2 MiB/s, 3 s left\n" in captured.err
    (found,) = json.loads(captured.out)["snapshots"]
    assert (found["state"], found["statistics"]["stored_bytes"]) == ("completed", 3 * MIB)


def test_one_that_is_in_error_at_once(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.created_state = pb.SNAPSHOT_STATE_ERROR
    assert run(["snapshot", "create", "db", "--wait", "-o", "json"]) == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out)["snapshots"][0]["state"] == "error"
    assert f"cairn snapshot retry {snapshot_id(10)}" in captured.err


def test_hooks_around_it(cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    arguments = ["--pre", f"echo pre >> {log}", "--post", f"echo post >> {log}"]
    assert run(["snapshot", "create", "db", *arguments, "-o", "json"]) == 0
    assert log.read_text().split() == ["pre", "post"]
    cluster.error = Conflict("volume db is in error")
    assert run(["snapshot", "create", "db", *arguments]) == 5
    assert log.read_text().split() == ["pre", "post"] * 2
    asked = len(cluster.requests)
    assert run(["snapshot", "create", "db", "--pre", "exit 1", "--post", f"echo post >> {log}"]) == 1
    assert len(cluster.requests) == asked
    assert log.read_text().split() == [*["pre", "post"] * 2, "post"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create"], "Missing argument"),
        (["create", "db", "--tag", "x"], "KEY=VALUE"),
        (["create", "db", "--hook-timeout", "0"], "hook-timeout"),
        (["wait", ONE, ONE], "once"),
        (["diff"], "Missing argument"),
    ],
)
def test_what_makes_no_sense(
    cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["snapshot", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert cluster.requests == []


def test_list(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[THREE] = make_snapshot(
        3, pb.SNAPSHOT_STATE_PENDING, progress=make_progress(MIB), description="[b]x[/b]"
    )
    assert run(["snapshot", "list", "--volume", "db"]) == 0
    assert cluster.last(pb.ListSnapshotsRequest) == pb.ListSnapshotsRequest(volume="db")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "VOLUME", "SIZE", "STATE", "CREATED", "CHANGED", "STORED", "DESCRIPTION"]
    assert lines[1].split()[:5] == [ONE, "db", "1", "GiB", "completed"]
    assert "pending 10%" in lines[3]
    assert lines[3].endswith("[b]x[/b]")


def test_a_list_of_the_newest(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "list", "--limit", "7"]) == 0
    assert cluster.last(pb.ListSnapshotsRequest) == pb.ListSnapshotsRequest(limit=7)
    for wrong in ("0", "-1", "x", "4294967296"):
        assert run(["snapshot", "list", "--limit", wrong]) == 2
        assert "--limit" in capsys.readouterr().err


def test_an_empty_list_says_what_to_do(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots = {}
    assert run(["snapshot", "list"]) == 0
    assert "cairn snapshot create" in capsys.readouterr().out
    assert run(["snapshot", "tree"]) == 0
    assert run(["snapshot", "list", "-o", "json"]) == 0


def test_show(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[TWO] = make_snapshot(2, parent=ONE, pause_us=1500, used_by=["vol-1"], tags={"a": "b"})
    assert run(["snapshot", "show", TWO]) == 0
    out = capsys.readouterr().out
    for text in (TWO, ONE, "1.5 ms", "vol-1", "a=b", "3 MiB compressed", "1,073,741,824", "000102"):
        assert text in out


def test_show_says_how_to_look_into_it(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"nbd://127.0.0.1:10809/{TWO}"
    cluster.snapshots[TWO] = make_snapshot(2, uris=[uri])
    assert run(["snapshot", "show", TWO]) == 0
    out = capsys.readouterr().out
    assert f"-N {TWO}+rw 127.0.0.1 10809 /dev/nbd0 && sudo mount /dev/nbd0 /mnt" in out
    assert f"  nbdcopy {uri} disk.img" in out.splitlines()
    assert run(["snapshot", "show", TWO, "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["uris"] == [uri]
    assert len(document["commands"]) == 3


def test_show_one_that_is_not_there(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "show", "snap-x"]) == 4
    assert capsys.readouterr().err == "cairn: no snapshot 'snap-x': `cairn snapshot list` shows all\n"


def usages() -> list[pb.StoreStatisticsResponse]:
    progress = pb.WorkProgress(phase="reading manifests", done=1, total=2, unit="shards")
    usage = pb.SnapshotUsage(snapshot=TWO, logical_bytes=100 * MIB, own_bytes=5 * MIB, shared_bytes=60 * MIB)
    return [pb.StoreStatisticsResponse(progress=progress), pb.StoreStatisticsResponse(snapshots=[usage])]


def test_tree(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[TWO] = make_snapshot(2, parent=ONE)
    cluster.answers["StoreStatistics"] = usages()
    assert run(["snapshot", "tree"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["SNAPSHOT", "VOLUME", "CREATED", "STATE", "LOGICAL", "OWN", "SHARED"]
    assert lines[1].split()[:2] == ["┌", ONE]
    assert lines[1].split()[-4:] == ["100", "MiB", "-", "-"]
    assert lines[2].split()[:2] == ["└", TWO]
    assert lines[2].split()[-6:] == ["100", "MiB", "5", "MiB", "60", "MiB"]
    assert "reading manifests: 1 shards of 2 shards (50%)" in captured.err


def test_tree_as_json(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[TWO] = make_snapshot(2, parent=ONE)
    cluster.answers["StoreStatistics"] = usages()
    assert run(["snapshot", "tree", "-o", "json"]) == 0
    first, second = document(capsys)["snapshots"]
    assert (first["id"], first["own_bytes"], first["parent"]) == (ONE, None, None)
    assert (second["own_bytes"], second["shared_bytes"], second["parent"]) == (5 * MIB, 60 * MIB, ONE)


def test_tree_without_snapshotd(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.daemons_up = False
    assert run(["snapshot", "tree"]) == 0
    captured = capsys.readouterr()
    assert ONE in captured.out
    assert "no snapshotd is up" in captured.err


def test_wait_shows_how_far_it_is(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[THREE] = make_snapshot(3, pb.SNAPSHOT_STATE_PENDING)
    pending = make_progress(MIB, why="the object store does not answer")
    cluster.watched = [make_snapshot(3, pb.SNAPSHOT_STATE_PENDING, progress=pending)]
    assert run(["snapshot", "wait", THREE, "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert "the object store does not answer" in captured.err
    assert json.loads(captured.out)["snapshots"][0]["state"] == "completed"


def test_wait_for_one_that_fails(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[TWO] = make_snapshot(2, pb.SNAPSHOT_STATE_ERROR, reason="no replica has it")
    assert run(["snapshot", "wait", ONE, TWO]) == 5
    captured = capsys.readouterr()
    assert f"{TWO} is in error: no replica has it" in captured.err
    assert captured.out.count("snap-") == 2


def test_wait_for_one_that_was_never_sealed(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[TWO] = make_snapshot(2, pb.SNAPSHOT_STATE_ERROR, reason="no quorum", sealed_at_ms=0)
    assert run(["snapshot", "wait", TWO]) == 5
    error = capsys.readouterr().err
    assert "retry" not in error
    assert "take another" in error


def test_wait_for_one_that_somebody_deletes(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    """A script must not take it for one that it can rely on."""
    cluster.snapshots[TWO].state = pb.SNAPSHOT_STATE_DELETING
    assert run(["snapshot", "wait", ONE, TWO, "-o", "json"]) == 5
    captured = capsys.readouterr()
    assert f"{TWO} is being deleted" in captured.err
    assert [each["state"] for each in json.loads(captured.out)["snapshots"]] == ["completed", "deleting"]


def test_wait_no_longer_than_was_said(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[THREE] = make_snapshot(3, pb.SNAPSHOT_STATE_PENDING)
    cluster.stands_still = True
    assert run(["snapshot", "wait", ONE, THREE, "--timeout", "1"]) == 8
    assert "not all of" in capsys.readouterr().err


def test_wait_for_nothing(cluster: CannedSnapshots) -> None:
    assert run(["snapshot", "wait", "snap-x"]) == 4


def test_delete(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "delete", ONE, TWO, "--yes", "-o", "json"]) == 0
    assert [each["state"] for each in document(capsys)["snapshots"]] == ["deleting", "deleting"]


def test_where_one_is_not_there_none_is_deleted(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "delete", ONE, THREE, "--yes"]) == 4
    assert THREE in capsys.readouterr().err
    assert cluster.snapshots[ONE].state == pb.SNAPSHOT_STATE_COMPLETED
    assert run(["snapshot", "delete", ONE, ONE, "--yes", "-o", "json"]) == 0
    assert [each["id"] for each in document(capsys)["snapshots"]] == [ONE]


def test_what_was_deleted_before_an_error_is_told(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.undeletable[TWO] = Conflict("it is needed")
    assert run(["snapshot", "delete", ONE, TWO, "--yes"]) == 5
    assert f"it is needed; deleted before that: {ONE}" in capsys.readouterr().err
    assert run(["snapshot", "delete", TWO, "--yes"]) == 5
    assert "before" not in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["inf", "1e9"])
def test_no_hook_holds_an_application_for_ever(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a deadline, infinity is one that has passed."""
    assert run(["snapshot", "create", "db", "--pre", "true", "--hook-timeout", seconds, "--control", "h:1"]) == 2
    assert "--hook-timeout" in capsys.readouterr().err


def test_a_tag_that_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "create", "db", "--tag", "a=b", "--tag", "a=c", "--control", "h:1"]) == 2
    assert "a is given twice" in capsys.readouterr().err


def test_retry(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[ONE].state = pb.SNAPSHOT_STATE_ERROR
    assert run(["snapshot", "retry", ONE, "-o", "json"]) == 0
    assert document(capsys)["state"] == "pending"


def test_completion(cluster: CannedSnapshots) -> None:
    cluster.snapshots[TWO].description = "nightly"
    assert complete_snapshot("snap-") == [(ONE, "db"), (TWO, "db nightly")]
    assert complete_snapshot(TWO[:-1]) == [(ONE, "db"), (TWO, "db nightly")]
    assert complete_snapshot(TWO) == [(TWO, "db nightly")]


def test_ids_are_whole_in_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as capture:
        console.print(snapshot_tables.snapshots([make_snapshot(1, description="long " * 20)]))
        console.print(snapshot_tables.tree([make_snapshot(1)], {}))
    assert capture.get().count(ONE) == 2
