"""`cairn volume` against a Control service with canned state: requests, tables, documents, waiting."""

import json
from collections.abc import Iterator

import pytest

from blockstore.cli.main import run
from blockstore.errors import Conflict
from blockstore.rpc import control_pb2 as pb
from tests.cli_control import URI, VOLUME, CannedControl, canned_control, make_attachment, make_volume
from tests.cli_output import document


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[CannedControl]:
    with canned_control() as canned:
        monkeypatch.setenv("CAIRN_CONTROL", canned.address)
        yield canned


def test_create_waits_until_it_is_available(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["volume", "create", "--size", "1.5G", "--name", "log", "--tag", "env=test", "--tag", "owner=", "-o"]
    assert run([*arguments, "json"]) == 0
    request = control.last(pb.CreateVolumeRequest)
    assert (request.size_bytes, request.name, dict(request.tags)) == (1536 << 20, "log", {"env": "test", "owner": ""})
    found = document(capsys)
    assert (found["name"], found["size_bytes"], found["state"]) == ("log", 1536 << 20, "available")


def test_create_says_what_it_waits_for(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.reason = "cannot create a replica: node x is down"
    assert run(["volume", "create", "--size", "1G"]) == 0
    assert "is creating: cannot create a replica: node x is down" in capsys.readouterr().err


def test_create_without_waiting(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "create", "--size", "1G", "--wait", "0", "--output", "json"]) == 0
    assert document(capsys)["state"] == "creating"


def test_create_says_what_an_error_is(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.error = Conflict("only 3 replicas in 1 zone are possible: give the nodes zones")
    assert run(["volume", "create", "--size", "1G"]) == 5
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"cairn: {control.error}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "12Q"], "not a size"),
        ([], "Missing option '--size'"),
        (["--size", "1G", "--tag", "x"], "KEY=VALUE"),
        (["--size", "1G", "extra"], "extra"),
    ],
)
def test_create_refuses(
    control: CannedControl, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["volume", "create", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert control.requests == []


def test_list_as_a_table(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(name="[red]x[/red]"), make_volume(id="vol-00000000000000002", name="")]
    assert run(["volume", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "SIZE", "STATE", "FRONT-END", "CREATED"]
    assert lines[1].split() == [VOLUME, "[red]x[/red]", "1", "GiB", "available", "-", "2023-11-14T22:13:20.123Z"]
    assert len(lines) == 3


def test_list_as_json(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "list", "-o", "json"]) == 0
    (volume,) = document(capsys)["volumes"]
    assert volume["id"] == VOLUME


def test_an_empty_list_says_what_to_do(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = []
    assert run(["volume", "list"]) == 0
    assert "cairn volume create" in capsys.readouterr().out
    assert run(["volume", "list", "-o", "json"]) == 0
    assert document(capsys) == {"volumes": []}


def test_show_by_name(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment(), warnings=["one zone"])]
    assert run(["volume", "show", "db"]) == 0
    out = capsys.readouterr().out
    for text in (
        VOLUME,
        "1,073,741,824 bytes",
        "in-use",
        "one zone",
        URI,
        "rep-00000000000000003",
        "attached, epoch 4",
    ):
        assert text in out


def test_show_says_what_is_wrong_with_replicas(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.states = ("up", "catching-up", "up")
    assert run(["volume", "show", "db"]) == 0
    out = capsys.readouterr().out
    assert "rep-00000000000000002 on node-00000000000000002 is catching-up: its node is down" in out
    assert "is up" not in out
    assert run(["volume", "show", "db", "-o", "json"]) == 0
    assert [each["lag_records"] for each in document(capsys)["replicas"]] == [0, 17, 0]


def test_show_one_that_is_not_there(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "show", "nothing", "-o", "json"]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "cairn: no volume 'nothing': `cairn volume list` shows all\n"


def test_delete(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "delete", "db", "--yes", "-o", "json"]) == 0
    assert document(capsys) == {"id": VOLUME, "deleted": True}
    assert control.volumes == []


def test_delete_while_a_node_is_down(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.nodes[0].up = False
    assert run(["volume", "delete", "db"]) == 0
    assert "when these come back" in capsys.readouterr().out


def test_resize(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "resize", "db", "--size", "2G", "-o", "json"]) == 0
    assert document(capsys)["size_bytes"] == 2 << 30


def test_attach_waits_until_it_is_served(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.serving = ["opening", "opening", "serving"]
    control.states = ("up", "up", "filling")
    assert run(["volume", "attach", "db", "--read-only", "--front-end", "fe-00000000000000001"]) == 0
    request = control.last(pb.AttachVolumeRequest)
    assert (request.read_only, request.force, request.accept_loss) == (True, False, False)
    captured = capsys.readouterr()
    assert URI in captured.out.splitlines()
    device = f"nbd-client -b 4096 -N {VOLUME} 127.0.0.1 10809 /dev/nbd0"
    for command in (device, f"qemu-img info {URI}", f"nbdcopy {URI}"):
        assert command in captured.out
    assert "is opening" in captured.err
    assert "filling" in captured.err


def test_attach_as_json(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "attach", "db", "-o", "json"]) == 0
    found = document(capsys)
    assert found["attachment"]["uris"] == [URI]
    assert found["commands"][1] == f"qemu-img info {URI}"


def test_attach_gives_up_and_says_why(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.serving = ["opening"]
    control.states = ("up", "down", "down")
    assert run(["volume", "attach", "db", "--wait", "0.5"]) == 8
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert "not served after" in last
    assert "down" in last


def test_attach_without_waiting(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.serving = ["opening"]
    assert run(["volume", "attach", "db", "--wait", "0", "-o", "json"]) == 0
    assert document(capsys)["state"] == "in-use"


def test_detach(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment())]
    assert run(["volume", "detach", VOLUME, "--force", "-o", "json"]) == 0
    assert control.last(pb.DetachVolumeRequest).force
    found = document(capsys)
    assert (found["state"], found["attachment"]) == ("available", None)


def test_detach_says_whom_it_waits_for(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment())]
    control.clients = [2, 1, 0]
    assert run(["volume", "detach", "db", "-o", "json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["attachment"] is None
    two, one = captured.err.splitlines()
    assert "2 NBD clients have requests in flight at front-end fe-" in two
    assert "an NBD client has requests in flight" in one


def test_a_detach_that_takes_longer_goes_on_by_itself(
    control: CannedControl, capsys: pytest.CaptureFixture[str]
) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_IN_USE, attachment=make_attachment())]
    control.clients = [3]
    assert run(["volume", "detach", "db", "--timeout", "0.3"]) == 8
    last = capsys.readouterr().err.splitlines()[-1]
    for text in ("not detached after", "3 NBD clients", "goes on by itself", "cairn volume show", "--force"):
        assert text in last
    control.serving = [""]
    assert run(["volume", "detach", "db", "--wait", "0.3"]) == 8
    assert "front-end fe-00000000000000001 does not answer" in capsys.readouterr().err


def test_recover_says_first_what_may_be_missing(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_ERROR, reason="records 7 to 9 may be missing")]
    assert run(["volume", "recover", "db"]) == 5
    captured = capsys.readouterr()
    assert "records 7 to 9 may be missing" in captured.err
    assert "--accept-loss" in captured.err
    assert "node-00000000000000001" in captured.out
    assert not [each for each in control.requests if isinstance(each, pb.AttachVolumeRequest)]


def test_recover_goes_on_when_the_loss_is_accepted(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.volumes = [make_volume(pb.VOLUME_STATE_ERROR, reason="records 7 to 9 may be missing")]
    assert run(["volume", "recover", "db", "--accept-loss", "-o", "json"]) == 0
    assert control.last(pb.AttachVolumeRequest).accept_loss
    assert document(capsys)["state"] == "in-use"


def test_recover_refuses_a_healthy_volume(control: CannedControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["volume", "recover", "db", "--accept-loss"]) == 5
    assert "needs no recovery" in capsys.readouterr().err
