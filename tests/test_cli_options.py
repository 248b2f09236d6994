"""Options made from settings: each field of each daemon's settings, there and back."""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import typer

from blockstore.cli.options import settings_command
from blockstore.cli.settings import environment_without_settings, read_plain_options, setting_from_text
from blockstore.cli.up import parse_overrides
from blockstore.config import (
    Addressing,
    ControlSettings,
    FrontEndSettings,
    NodeSettings,
    Placement,
    ShortCircuitMode,
    SnapshotdSettings,
    Tls,
    arguments_of,
    option_name,
)
from blockstore.errors import InvalidRequest

KINDS = [ControlSettings, NodeSettings, FrontEndSettings, SnapshotdSettings]
OTHERS: dict[Enum, Enum] = {
    Placement.STRICT: Placement.WARN,
    Addressing.PATH: Addressing.HOST,
    Tls.NONE: Tls.OFFER,
    ShortCircuitMode.AUTO: ShortCircuitMode.ALWAYS,
}
ADDRESSES = {"listen", "advertise", "metrics", "control", "nbd_listen", "nbd_advertise"}


def other(kind: type[Any]) -> Any:
    """Settings of which none is the default."""
    return kind(**{each.name: other_value(each) for each in dataclasses.fields(kind)})


def other_value(each: "dataclasses.Field[Any]") -> Any:
    """Another value than the default, of the same type."""
    if each.name in ADDRESSES:
        return "[::1]:4321"
    match each.default:
        case Enum():
            return OTHERS[each.default]
        case Path() | None:
            return Path("/some where/else")
        case str():
            return "another one"
        case bool():
            return not each.default
        case int() | float():
            most = each.metadata["maximum"]
            return each.default * 2 or 7 if most is None or each.default * 2 <= most else each.default / 2
    raise AssertionError(f"{each.name}: a new type of setting")


def parsed(kind: type[Any], arguments: list[str]) -> Any:
    """The settings that a command line makes."""
    got: list[Any] = []

    def run(settings: Any) -> int:
        got.append(settings)
        return 7

    app = typer.Typer()
    app.command()(settings_command(kind, run, "Help."))
    assert app(arguments, standalone_mode=False) == 7
    return got[0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_gives_the_defaults(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_CONTROL", raising=False)
    assert parsed(kind, []) == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_passes_through_the_command_line(kind: type[Any]) -> None:
    changed = other(kind)
    assert [each.name for each in dataclasses.fields(kind) if getattr(changed, each.name) == each.default] == []
    assert parsed(kind, arguments_of(changed)) == changed


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_can_be_set_for_up(kind: type[Any]) -> None:
    for each in dataclasses.fields(kind):
        value = other_value(each)
        text = value.value if isinstance(value, Enum) else str(value)
        assert setting_from_text(kind, option_name(each.name), text) == (each.name, value)
        assert setting_from_text(kind, option_name(each.name)[2:].replace("-", "_"), text) == (each.name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_line_is_read_as_the_parser_reads_it(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAIRN_CONTROL", raising=False)
    changed = other(kind)
    assert read_plain_options(kind, []) == kind()
    assert read_plain_options(kind, arguments_of(changed)) == changed
    for each in dataclasses.fields(kind):
        line = arguments_of(kind(**{each.name: other_value(each)}))
        assert read_plain_options(kind, [*line, *line]) == parsed(kind, [*line, *line])


@pytest.mark.parametrize(
    "line",
    [
        ["--help"],
        ["-h"],
        ["--zone"],
        ["--zone", "--help"],
        ["--zone=a"],
        ["zone", "a"],
        ["--zone", "a", "b"],
        ["--call_timeout_s", "1"],
        ["--nbd-listen", "127.0.0.1:1"],
        ["--checkpoint-s", "soon"],
        ["--checkpoint-s", "0"],
        ["--checkpoint", "1X"],
    ],
)
def test_any_other_line_is_left_to_the_parser(line: list[str]) -> None:
    assert read_plain_options(NodeSettings, line) is None


def test_control_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAIRN_CONTROL", "host:9")
    for read in (parsed, read_plain_options):
        assert read(NodeSettings, []) == NodeSettings(control="host:9")
        assert read(NodeSettings, ["--control", "other:8"]) == NodeSettings(control="other:8")
    monkeypatch.setenv("CAIRN_METASTORE_CA_FILE", "/ca")
    monkeypatch.setenv("CAIRN_METASTORE_USER", "")
    for read in (parsed, read_plain_options):
        assert read(ControlSettings, []) == ControlSettings(metastore_ca_file=Path("/ca"))


def test_overrides_by_daemon() -> None:
    assert parse_overrides(["node.reserve=0", "node.checkpoint-s=2", "control.placement=warn"]) == {
        "control": {"placement": Placement.WARN},
        "node": {"reserve_bytes": 0, "checkpoint_s": 2.0},
        "nbd": {},
        "snapshotd": {},
    }


@pytest.mark.parametrize(
    "text",
    [
        "node.data=/x",
        "node.checkpoint=1",
        "node.reserve",
        "reserve=0",
        "disk.reserve=0",
        "node.nothing=1",
        "node.reserve=x",
        "control.placement=x",
    ],
)
def test_an_override_that_makes_no_sense(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_overrides([text])


def test_processes_of_up_inherit_no_settings() -> None:
    kept = {"PATH": "/bin", "AWS_ACCESS_KEY_ID": "x", "CAIRN_STATE": "s", "CAIRN_METASTORE_PASSWORD": "p"}
    settings = {"CAIRN_CONTROL": "10.0.0.1:7300", "CAIRN_METASTORE": "etcd://a:1", "CAIRN_METASTORE_USER": "u"}
    assert environment_without_settings(kept | settings) == kept
