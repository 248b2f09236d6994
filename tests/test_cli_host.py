"""`cairn attach` and `cairn detach` as far as they need no kernel: tests/test_linux_host_attach.py has the rest."""

import configparser
import json

import pytest

from blockstore.cli.main import run


def test_what_makes_no_sense_is_refused_before_anything_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        ([], "Missing argument 'VOLUME'"),
        (["/dev/nbd0"], "name the volume first"),
        (["db", "/dev/sda"], "no NBD device"),
        (["db", "--dead-timeout", "0"], "--dead-timeout"),
        (["db", "--connections", "0"], "--connections 0 is outside 1 to 16"),
        (["db", "--connections", "-1"], "--connections"),
        (["db", "--connections", "17"], "--connections 17 is outside 1 to 16"),
        (["db", "--connections", "many"], "--connections"),
        (["db", "--control", "nowhere"], "no address"),
    ):
        assert run(["attach", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err


def test_a_list_is_a_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attach", "--list", "-o", "json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["devices"], list)


def test_the_unit_runs_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["attach", "--unit"]) == 0
    unit = configparser.RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(capsys.readouterr().out)
    assert unit["Service"]["ExecStart"].endswith("/cairn attach %i $CAIRN_ATTACH")
    assert unit["Service"]["ExecStart"].startswith("/")
    assert unit["Service"]["Type"] == "notify"
    assert "@CAIRN@" not in unit["Service"]["ExecStop"]
