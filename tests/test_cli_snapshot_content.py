"""`cairn snapshot verify|diff|export|import`: what is asked of snapshotd, and what is made of its answers."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from blockstore.cli.main import run
from blockstore.cli.snapshot_content import joined
from blockstore.errors import Corrupt, NoSpace, QuorumUnavailable
from blockstore.rpc import snapshot_pb2 as pb
from snapshotd.compression import compress
from tests.cli_output import document
from tests.cli_snapshots import MIB, CannedSnapshots, canned_cluster, make_snapshot, snapshot_id

ONE, TWO = (snapshot_id(n) for n in (1, 2))
PROBLEM = pb.StoreProblem(object="packs/ab/abcd", message="its hash is another", snapshots=[ONE])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedSnapshots]:
    with canned_cluster() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def progress(done: int) -> pb.WorkProgress:
    return pb.WorkProgress(phase="frames", done=done, total=4 * MIB, unit="bytes")


def test_verify(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answers["Verify"] = [pb.VerifyResponse(progress=progress(n * MIB)) for n in range(5)]
    assert run(["snapshot", "verify", ONE, "--sample", "0.25"]) == 0
    request = cluster.last(pb.VerifyRequest)
    assert (list(request.snapshots), request.sample) == ([ONE], 0.25)
    captured = capsys.readouterr()
    assert captured.out == f"{ONE}: all is sound\n"
    assert "frames: 4 MiB of 4 MiB (100%)" in captured.err


def test_verify_finds_damage(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    found_so_far = pb.VerifyResponse(progress=progress(1), problems=[PROBLEM])
    cluster.answers["Verify"] = [found_so_far, pb.VerifyResponse(problems=[PROBLEM])]
    assert run(["snapshot", "verify"]) == 9
    captured = capsys.readouterr()
    assert "packs/ab/abcd" in captured.out
    assert ONE in captured.err.splitlines()[-1]
    assert run(["snapshot", "verify", "-o", "json"]) == 9
    found = document(capsys)
    assert found["ok"] is False
    assert found["problems"] == [{"object": "packs/ab/abcd", "message": "its hash is another", "snapshots": [ONE]}]


def test_without_snapshotd(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.daemons_up = False
    for command in (["verify"], ["diff", ONE], ["export", ONE, "/nowhere/x"]):
        assert run(["snapshot", *command]) == 8
        assert "cairn snapshotd run" in capsys.readouterr().err


# ---- diff


def byte_range(offset: int, size: int, zero: bool = False) -> pb.ByteRange:
    return pb.ByteRange(offset=offset, size=size, zero=zero)


def test_diff(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.answers["Diff"] = [
        pb.DiffResponse(ranges=[byte_range(0, MIB), byte_range(4 * MIB, MIB)]),
        pb.DiffResponse(ranges=[byte_range(5 * MIB, MIB), byte_range(6 * MIB, MIB, zero=True)]),
    ]
    assert run(["snapshot", "diff", ONE, TWO]) == 0
    request = cluster.last(pb.DiffRequest)
    assert (getattr(request, "from"), request.to) == (ONE, TWO)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["OFFSET", "BYTES", "NOW"],
        ["0", "1,048,576", "data"],
        ["4,194,304", "2,097,152", "data"],
        ["6,291,456", "1,048,576", "zeroes"],
        ["3", "ranges,", "4", "MiB"],
    ]
    assert run(["snapshot", "diff", ONE, TWO, "-o", "json"]) == 0
    found = document(capsys)
    assert (found["from"], found["to"], found["changed_bytes"]) == (ONE, TWO, 4 * MIB)
    assert found["ranges"][2] == {"offset": 6 * MIB, "size": MIB, "zero": True}


def test_what_one_holds(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["snapshot", "diff", ONE, "-o", "json"]) == 0
    request = cluster.last(pb.DiffRequest)
    assert (getattr(request, "from"), request.to) == ("", ONE)
    assert document(capsys) == {"from": None, "to": ONE, "changed_bytes": 0, "ranges": []}


def test_ranges_that_touch_are_one() -> None:
    given = [byte_range(0, 5), byte_range(5, 5), byte_range(10, 5, True), byte_range(15, 1, True), byte_range(17, 1)]
    assert [(each.offset, each.size, each.zero) for each in joined(given)] == [
        (0, 10, False), (10, 6, True), (17, 1, False)
    ]  # fmt: skip
    assert list(joined([])) == []


# ---- export


def exported(*pieces: tuple[int, bytes]) -> list[Any]:
    return [pb.ExportResponse(offset=offset, data=data) for offset, data in pieces]


def test_export(cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[ONE].size_bytes = 8 * MIB
    cluster.answers["Export"] = exported((0, b"a" * 4096), (5 * MIB, b"b" * 8192))
    path = tmp_path / "image"
    assert run(["snapshot", "export", ONE, str(path), "-o", "json"]) == 0
    assert document(capsys) == {"id": ONE, "file": str(path), "size_bytes": 8 * MIB, "data_bytes": 12_288}
    assert path.read_bytes() == (b"a" * 4096).ljust(5 * MIB, b"\0") + (b"b" * 8192).ljust(3 * MIB, b"\0")
    assert run(["snapshot", "export", ONE, str(path)]) == 5
    assert run(["snapshot", "export", ONE, str(path), "--force"]) == 0


def frame(content: bytes, *parts: tuple[int, int, int], checksum: int | None = None) -> pb.ExportedFrame:
    """parts: block of the volume, slot, count."""
    body = compress(content)
    columns: dict[str, Any] = dict(zip(("blocks", "slots", "counts"), zip(*parts, strict=True), strict=True))
    return pb.ExportedFrame(body=body, checksum=xxh3_64_intdigest(body) if checksum is None else checksum, **columns)


def test_export_of_frames(cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.snapshots[ONE].size_bytes = 8 * MIB - 1024
    first = frame(b"a" * 4096 + b"b" * 4096, (5, 1, 1), (2047, 0, 1), (0, 0, 2))
    others = [frame(bytes([n]) * 4096, (100 + n, 0, 1)) for n in range(40)]
    cluster.answers["Export"] = [pb.ExportResponse(frames=[first]), *(pb.ExportResponse(frames=[f]) for f in others)]
    path = tmp_path / "image"
    assert run(["snapshot", "export", ONE, str(path), "-o", "json"]) == 0
    assert cluster.last(pb.ExportRequest).frames
    assert document(capsys)["data_bytes"] == 44 * 4096
    expected = bytearray(8 * MIB)
    expected[: 2 * 4096] = b"a" * 4096 + b"b" * 4096
    expected[5 * 4096 : 6 * 4096] = b"b" * 4096
    for n in range(40):
        expected[(100 + n) * 4096 : (101 + n) * 4096] = bytes([n]) * 4096
    expected[2047 * 4096 :] = b"a" * 4096
    assert path.read_bytes() == expected[:-1024]
    assert path.stat().st_blocks * 512 < MIB, "what is left out stays a hole"


@pytest.mark.parametrize(
    "bad",
    [frame(b"a" * 4096, (0, 0, 1), checksum=1), frame(b"a" * 4096, (0, 0, 2)), frame(b"a" * 4096, (0, 1, 1))],
    ids=["changed on the way", "more blocks than it has", "behind its end"],
)
def test_a_frame_that_cannot_be_leaves_nothing(cluster: CannedSnapshots, tmp_path: Path, bad: pb.ExportedFrame) -> None:
    sound = pb.ExportResponse(frames=[frame(b"b" * 4096, (9, 0, 1))])
    cluster.answers["Export"] = [sound, pb.ExportResponse(frames=[bad]), sound]
    assert run(["snapshot", "export", ONE, str(tmp_path / "image")]) == 9
    assert os.listdir(tmp_path) == []


def test_a_failed_export_leaves_nothing(cluster: CannedSnapshots, tmp_path: Path) -> None:
    cluster.answers["Export"] = [*exported((0, b"a" * 4096)), Corrupt("packs/ab is damaged")]
    assert run(["snapshot", "export", ONE, str(tmp_path / "image")]) == 9
    assert os.listdir(tmp_path) == []


def test_an_export_that_is_terminated_leaves_nothing(
    cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over = threading.Event()

    def pieces() -> Iterator[Any]:
        yield from exported((0, b"a" * 4096))
        while not list(tmp_path.glob(".image.*.partial")):
            assert not over.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(30)

    cluster.answers["Export"] = pieces()
    assert run(["snapshot", "export", ONE, str(tmp_path / "image")]) == 143
    over.set()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().err.splitlines()[-1] == "cairn: terminated"


def test_export_to_stdout(cluster: CannedSnapshots, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    cluster.snapshots[ONE].size_bytes = 8192
    cluster.answers["Export"] = exported((4096, b"a" * 4096))
    assert run(["snapshot", "export", ONE, "-", "-o", "json"]) == 2
    assert run(["snapshot", "export", ONE, "-"]) == 0
    assert capfdbinary.readouterr().out == bytes(4096) + b"a" * 4096


def test_only_a_completed_one_is_exported(
    cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.snapshots[ONE] = make_snapshot(1, pb.SNAPSHOT_STATE_PENDING)
    assert run(["snapshot", "export", ONE, str(tmp_path / "image")]) == 5
    assert f"cairn snapshot wait {ONE}" in capsys.readouterr().err


# ---- import


def test_import(cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = os.urandom(MIB) + bytes(3 * MIB) + os.urandom(5000)
    (tmp_path / "raw").write_bytes(content)
    assert run(["snapshot", "import", str(tmp_path / "raw"), "-d", "golden", "--tag", "os=debian", "-o", "json"]) == 0
    first, *rest = cluster.imported
    assert (first.size_bytes, first.description, dict(first.tags)) == (4 * MIB + 8192, "golden", {"os": "debian"})
    assert not first.data
    received = bytearray(first.size_bytes)
    for each in rest:
        assert not each.size_bytes
        received[each.offset : each.offset + len(each.data)] = each.data
    assert received == content.ljust(first.size_bytes, b"\0")
    assert [each.last for each in rest] == [False, False, True]  # and none for the zeroes
    assert document(capsys)["volume"] is None


def test_an_import_that_is_refused(
    cluster: CannedSnapshots, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").write_bytes(os.urandom(20 * MIB))
    cluster.error = None
    cluster.imported = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cluster, "_note", lambda *_: None)  # only Import fails
        cluster.error = NoSpace("the bucket is full")
        assert run(["snapshot", "import", str(tmp_path / "raw")]) == 6
    assert capsys.readouterr().err.splitlines()[-1] == "cairn: the bucket is full"


def test_an_import_that_cannot_be_read_is_cancelled(
    cluster: CannedSnapshots, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.write(write, b"x" * 4096)
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(["snapshot", "import", "-", "--size", "1M"]) == 2
    error = capfd.readouterr().err
    assert "stdin ended after 4096" in error
    assert "Traceback" not in error
    assert not any(each.last for each in cluster.imported)


def test_control_that_is_gone_is_told(cluster: CannedSnapshots, tmp_path: Path) -> None:
    cluster.error = QuorumUnavailable("the object store does not answer")
    assert run(["snapshot", "export", ONE, str(tmp_path / "x")]) == 8
