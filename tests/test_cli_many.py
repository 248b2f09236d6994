"""The command on a cluster whose lists outgrew one message: everything is shown, in the shape of always."""

import json
from collections.abc import Iterator

import pytest

from blockstore.cli.main import run
from blockstore.rpc import control_pb2
from blockstore.rpc import snapshot_pb2 as pb
from tests.cli_control import make_node, make_volume, node_id
from tests.cli_snapshots import CannedSnapshots, canned_cluster, make_snapshot, snapshot_id

MANY = 20_000
VOLUMES = 9_000
#: gRPC's, which the servers of these tests have.
MESSAGE_SIZE = 4 << 20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedSnapshots]:
    with canned_cluster() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_snapshots(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    text = "what a nightly job writes of each of them, and it is longer than most of them are"
    cluster.snapshots = {snapshot_id(n): make_snapshot(n, description=text) for n in range(1, MANY + 1)}
    assert pb.ListSnapshotsResponse(snapshots=cluster.snapshots.values()).ByteSize() > MESSAGE_SIZE
    assert run(["snapshot", "list", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["snapshots"]
    assert [each["id"] for each in found["snapshots"]] == list(cluster.snapshots)


def test_volumes_nodes_and_status(cluster: CannedSnapshots, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.control is not None
    cluster.control.volumes = [
        make_volume(id=f"vol-{n:017x}", name=f"volume-{n}", reason="x" * 200) for n in range(VOLUMES)
    ]
    cluster.control.nodes = [make_node(1 + n % 3) for n in range(3)]
    assert control_pb2.ListVolumesResponse(volumes=cluster.control.volumes).ByteSize() > MESSAGE_SIZE
    assert run(["volume", "list", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["volumes"]] == [f"volume-{n}" for n in range(VOLUMES)]
    assert run(["status", "-o", "json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["healthy"], len(status["volumes"])) == (True, VOLUMES)
    assert [each["id"] for each in status["nodes"]] == [node_id(n) for n in (1, 2, 3)]
    assert len(status["front_ends"]) == 1
