"""The JSON documents: their keys are the documented ones, and none is missing from the docs."""

from pathlib import Path
from typing import Any

from blockstore.cli import documents, node_check, tables
from blockstore.cli.screen import print_table
from blockstore.domain import Position, ReplicaAddress, ReplicaId, SegmentNumber, VolumeId
from blockstore.rpc import control_pb2 as pb
from blockstore.storage.check import CheckReport, Problem, ReplicaSummary
from blockstore.units import Epoch, Generation, Sequence
from tests.cli_control import FRONT_END, URI, VOLUME, make_attachment, make_health, make_node, make_volume, replica_id
from tests.cli_output import DOCS, keys_of

ATTACHED = make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment(), tags={"b": "2", "a": "1"})
SUMMARY = ReplicaSummary(
    ReplicaAddress(VolumeId(VOLUME), SegmentNumber(0), ReplicaId(replica_id(1))),
    Position(Epoch(4), Sequence(100)),
    Epoch(5),
    whole=True,
    blocks=1234,
    generations=(Generation(0), Generation(1)),
    file_bytes=5 << 20,
    digest="00ff",
    digests={Generation(1): "11"},
)
REPORT = CheckReport([Problem(Path("/data/x"), "block 7 fails its checksum", "start the node")], [SUMMARY])
STATUS = pb.StatusResponse(
    healthy=True,
    problems=[pb.Problem(severity=pb.SEVERITY_WARNING, subject=VOLUME, message="two zones")],
    volumes=[make_health(ATTACHED)],
    nodes=[make_node(1)],
    front_ends=[pb.FrontEndInfo(id=FRONT_END, uris=[URI])],
)


def test_a_volume() -> None:
    found = documents.volume(ATTACHED)
    assert found == {
        "id": VOLUME,
        "name": "db",
        "size_bytes": 1 << 30,
        "state": "in-use",
        "reason": "",
        "tags": {"a": "1", "b": "2"},
        "created_at": "2023-11-14T22:13:20.123Z",
        "epoch": 4,
        "attachment": {
            "front_end": FRONT_END,
            "epoch": 4,
            "state": "attached",
            "read_only": False,
            "since": "2023-11-14T22:13:20.123Z",
            "uris": [URI],
            "client": None,
        },
        "segments": found["segments"],
        "segment_size_bytes": 0,
        "growing_to_bytes": 0,
        "warnings": [],
        "source": None,
        "hydration": None,
    }
    (segment,) = found["segments"]
    assert segment["members"][2] == {
        "replica": replica_id(3),
        "node": "node-00000000000000003",
        "address": "127.0.0.1:7403",
        "zone": "c",
        "known": {"epoch": 0, "sequence": 0},
    }


def test_what_is_absent_is_null() -> None:
    assert documents.volume(make_volume())["attachment"] is None
    assert documents.node(pb.Node(id="x"))["last_heartbeat"] is None


def test_every_state_has_a_word() -> None:
    words = [documents.volume_state(pb.Volume(state=value)) for value in pb.VolumeState.values()[1:]]
    assert words == ["creating", "available", "in-use", "deleting", "error"]


def test_every_key_is_documented() -> None:
    keys = {*keys_of(documents.status(STATUS)), *keys_of(node_check.document(REPORT))}
    assert sorted(key for key in keys if f"`{key}`" not in DOCS) == []


def test_a_check_as_a_document() -> None:
    found = node_check.document(REPORT)
    assert found["ok"] is False
    assert found["problems"] == [
        {"where": "/data/x", "what": "block 7 fails its checksum", "what_to_do": "start the node"}
    ]
    (replica,) = found["replicas"]
    assert replica["applied"] == {"epoch": 4, "sequence": 100}
    assert replica["generations"] == [0, 1]


def test_a_check_as_a_table(capsys: Any) -> None:
    print_table(node_check.table(REPORT))
    out = capsys.readouterr().out
    assert "block 7 fails its checksum" in out
    assert "start the node" in out
    print_table(node_check.table(CheckReport([], [SUMMARY])))
    assert capsys.readouterr().out.endswith("\nhealthy\n")


def test_a_filling_replica_shows_how_far_it_is(capsys: Any) -> None:
    health = make_health(ATTACHED, states=("up", "up", "filling"))
    health.replicas[2].extents_done, health.replicas[2].extents_total = 256, 1024
    print_table(tables.status(pb.StatusResponse(healthy=False, volumes=[health])))
    out = capsys.readouterr().out
    assert "filling 25%" in out
    assert "no front-end" in out
