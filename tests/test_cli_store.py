"""`cairn store`, `cairn key` and what volumes show of their source."""

from collections.abc import Iterator

import pytest

from blockstore.cli import snapshot_documents
from blockstore.cli.main import run
from blockstore.rpc import control_pb2
from blockstore.rpc import snapshot_pb2 as pb
from tests.cli_control import VOLUME
from tests.cli_output import DOCS, document, keys_of
from tests.cli_snapshots import (
    DAEMON,
    MIB,
    CannedSnapshots,
    canned_cluster,
    make_progress,
    make_restored,
    make_snapshot,
    snapshot_id,
)

ONE, TWO = (snapshot_id(n) for n in (1, 2))
PROBLEM = pb.StoreProblem(object="packs/ab/abcd", message="is missing", snapshots=[ONE])
PLAN = pb.PrunePlan(objects_deleted=3, packs_repacked=1, bytes_freed=5 * MIB, bytes_copied=MIB, bytes_kept=9 * MIB)
PROGRESS = pb.WorkProgress(phase="marking", done=1, total=2, unit="snapshots")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedSnapshots]:
    with canned_cluster() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_forget(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "forget", DAEMON]) == 0
    assert cluster.last(pb.ForgetDaemonRequest).daemon == DAEMON
    assert "is forgotten" in capsys.readouterr().out
    assert run(["store", "forget", DAEMON, "-o", "json"]) == 0
    assert document(capsys) == {"id": DAEMON, "removed": True}


def test_show(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["store", "show"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [DAEMON, "up", cluster.address, "s3://bucket/x", "r1"]
    assert run(["store", "show", "-o", "json"]) == 0
    (daemon,) = document(capsys)["daemons"]
    assert daemon == {
        "id": DAEMON,
        "address": cluster.address,
        "up": True,
        "store": "s3://bucket/x",
        "repository": "r1",
    }


def test_prune(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    planned = [pb.PruneResponse(progress=PROGRESS), pb.PruneResponse(plan=PLAN)]
    cluster.answers["Prune"] = planned
    assert run(["store", "prune", "--dry-run"]) == 0
    assert cluster.last(pb.PruneRequest) == pb.PruneRequest(dry_run=True)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split() == ["frees", "5", "MiB"]
    assert "marking: 1 snapshots of 2 snapshots (50%)" in captured.err
    cluster.answers["Prune"] = [*planned, pb.PruneResponse(plan=PLAN, done=True)]
    assert run(["store", "prune", "--repack-share", "0.5", "-o", "json"]) == 0
    assert cluster.last(pb.PruneRequest).repack_share == 0.5
    found = document(capsys)
    assert (found["bytes_freed"], found["done"], found["dry_run"]) == (5 * MIB, True, False)
    assert run(["store", "prune", "--repack-share", "0"]) == 0
    assert cluster.last(pb.PruneRequest) == pb.PruneRequest(repack_share=0.0), "0 is no default"


def test_a_prune_that_does_not_come_to_its_end(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answers["Prune"] = [pb.PruneResponse(plan=PLAN)]
    assert run(["store", "prune"]) == 8
    assert "start it again" in capsys.readouterr().err


def test_check(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    last = pb.CheckStoreResponse(unreferenced_objects=2, unreferenced_bytes=MIB)
    cluster.answers["CheckStore"] = [pb.CheckStoreResponse(progress=PROGRESS), last]
    assert run(["store", "check"]) == 0
    assert capsys.readouterr().out == "all is there; 2 objects (1 MiB) that prune would remove\n"
    cluster.answers["CheckStore"] = [pb.CheckStoreResponse(problems=[PROBLEM]), last]
    assert run(["store", "check", "-o", "json"]) == 9
    found = document(capsys)
    assert (found["ok"], found["unreferenced_objects"], found["problems"][0]["object"]) == (False, 2, "packs/ab/abcd")


def test_stats(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    usage = pb.SnapshotUsage(snapshot=ONE, logical_bytes=6 * MIB, own_bytes=MIB, shared_bytes=2 * MIB)
    cluster.answers["StoreStatistics"] = [
        pb.StoreStatisticsResponse(progress=PROGRESS),
        pb.StoreStatisticsResponse(
            objects=12, stored_bytes=2 * MIB, unique_bytes=4 * MIB, referenced_bytes=6 * MIB, snapshots=[usage]
        ),
    ]
    assert run(["store", "stats"]) == 0
    out = capsys.readouterr().out
    assert "4 MiB (2.00 times that)" in out
    assert "6 MiB (1.50 times that)" in out
    assert run(["store", "stats", "-o", "json"]) == 0
    found = document(capsys)
    assert (found["compression_ratio"], found["dedupe_ratio"]) == (2.0, 1.5)
    assert found["snapshots"] == [
        {"snapshot": ONE, "logical_bytes": 6 * MIB, "own_bytes": MIB, "shared_bytes": 2 * MIB}
    ]


def test_stats_of_an_empty_store(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answers["StoreStatistics"] = [pb.StoreStatisticsResponse()]
    assert run(["store", "stats"]) == 0
    assert run(["store", "stats", "-o", "json"]) == 0
    assert '"dedupe_ratio": null' in capsys.readouterr().out


def test_adopt(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answers["Adopt"] = [pb.AdoptResponse(progress=PROGRESS), pb.AdoptResponse(snapshots=[ONE, TWO])]
    assert run(["store", "adopt", "--force", "-o", "json"]) == 0
    assert cluster.last(pb.AdoptRequest).force
    assert document(capsys) == {"snapshots": [ONE, TWO], "problems": []}


def test_rotate(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["key", "rotate", "-o", "json"]) == 0
    assert cluster.last(pb.RotateKeyRequest) == pb.RotateKeyRequest()
    assert document(capsys) == {"key": "the keyring /x", "rewrapped": 1}
    assert run(["key", "rotate"]) == 0
    assert "the keyring /x" in capsys.readouterr().out


# ---- restored volumes


def test_create_from_a_snapshot(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.control is not None
    assert run(["volume", "create", "--snapshot", ONE, "--init-rate", "50M/s", "-o", "json"]) == 0
    request = cluster.control.last(control_pb2.CreateVolumeRequest)
    assert (request.snapshot, request.size_bytes, request.init_rate_bytes) == (ONE, 0, 50 * MIB)
    assert run(["volume", "create", "--snapshot", ONE, "--size", "2G"]) == 0
    request = cluster.control.last(control_pb2.CreateVolumeRequest)
    assert (request.size_bytes, request.init_rate_bytes) == (2 << 30, 0)


def test_a_rate_without_a_snapshot(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "create", "--size", "1G", "--init-rate", "1M"]) == 2
    assert "--snapshot" in capsys.readouterr().err


def test_source_and_hydration_are_shown(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.control is not None
    cluster.control.volumes.append(make_restored(paused=True, rate_bytes=9 * MIB, why="snapshotd is down"))
    cluster.control.volumes[1].id = "vol-00000000000000002"
    assert run(["volume", "show", "copy"]) == 0
    text = f"{ONE}, 2 MiB of 3.9 MiB hydrated (50%), paused, at most 9 MiB/s, snapshotd is down"
    assert text in capsys.readouterr().out
    assert run(["volume", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("SOURCE")
    assert lines[2].endswith(text)
    assert run(["status"]) == 0
    assert text in capsys.readouterr().out
    assert run(["volume", "list", "-o", "json"]) == 0
    plain, restored = document(capsys)["volumes"]
    assert (plain["source"], plain["hydration"]) == (None, None)
    assert (restored["source"]["snapshot"], restored["hydration"]["blocks_done"]) == (ONE, 500)


@pytest.mark.parametrize(
    ("arguments", "paused", "rate"),
    [(["pause", VOLUME], True, None), (["resume", VOLUME], False, None), (["rate", VOLUME, "20M"], None, 20 * MIB)],
)
def test_hydrate(
    cluster: CannedSnapshots,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    paused: bool | None,
    rate: int | None,
) -> None:
    assert run(["volume", "hydrate", *arguments, "-o", "json"]) == 0
    request = cluster.last(pb.SetHydrationRequest)
    assert request.volume == VOLUME
    assert (request.paused if request.HasField("paused") else None) == paused
    assert (request.rate_bytes if request.HasField("rate_bytes") else None) == rate
    assert document(capsys)["hydration"]["blocks_total"] == 1000


def test_every_key_is_documented() -> None:
    documents = [
        snapshot_documents.snapshot(make_snapshot(1, progress=make_progress(1))),
        snapshot_documents.plan(PLAN),
        snapshot_documents.problem(PROBLEM),
        snapshot_documents.daemon(pb.StoreDaemon()),
        snapshot_documents.byte_range(pb.ByteRange()),
        snapshot_documents.store_statistics(pb.StoreStatisticsResponse(snapshots=[pb.SnapshotUsage()])),
    ]
    keys = {key for each in documents for key in keys_of(each)}
    assert sorted(key for key in keys if f"`{key}`" not in DOCS) == []
