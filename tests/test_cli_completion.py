"""What the shell is offered."""

import os
import subprocess

import pytest

from blockstore.cli.completion import complete_node, complete_volume
from blockstore.cli.daemons import CAIRN
from tests.cli_control import VOLUME, canned_control, make_volume, node_id
from tests.loopback import free_address


def test_ids_and_names_of_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    with canned_control() as control:
        control.volumes = [make_volume(), make_volume(id="vol-00000000000000002", name="")]
        monkeypatch.setenv("CAIRN_CONTROL", control.address)
        assert complete_volume("") == [(VOLUME, "db"), ("vol-00000000000000002", ""), ("db", VOLUME)]
        assert complete_volume("d") == [("db", VOLUME)]
        assert complete_volume("x") == []


def test_ids_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    with canned_control() as control:
        monkeypatch.setenv("CAIRN_CONTROL", control.address)
        assert complete_node(node_id(2)) == [(node_id(2), "b")]


def test_nothing_is_offered_without_control(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAIRN_CONTROL", free_address())
    assert complete_volume("") == []
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_through_the_shell() -> None:
    with canned_control() as control:
        environment = {
            **os.environ,
            "CAIRN_CONTROL": control.address,
            "_CAIRN_COMPLETE": "complete_bash",
            "COMP_WORDS": "cairn volume show d",
            "COMP_CWORD": "3",
        }
        done = subprocess.run(CAIRN, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["db"]
    assert done.stderr == ""
