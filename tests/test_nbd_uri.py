"""NBD URIs and the lines to try."""

import pytest

from blockstore.errors import InvalidRequest
from nbd_server.uri import NbdTarget, commands, parse_uri


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("nbd://127.0.0.1:4567/db", NbdTarget("db", "127.0.0.1", 4567)),
        ("nbd://[::1]:1/a%20b", NbdTarget("a b", "::1", 1)),
        ("nbd://host", NbdTarget("", "host", 10809)),
        ("nbd+unix:///db?socket=/run/cairn%201/nbd.sock", NbdTarget("db", socket_path="/run/cairn 1/nbd.sock")),
    ],
)
def test_a_uri_is_taken_apart(uri: str, target: NbdTarget) -> None:
    assert parse_uri(uri) == target


@pytest.mark.parametrize("uri", ["", "db", "http://host/db", "nbd+unix:///db", "nbd:///db"])
def test_what_is_no_nbd_uri(uri: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_uri(uri)


def test_commands() -> None:
    assert commands([]) == []
    assert commands(["nbd://127.0.0.1:1/db", "nbd+unix:///db?socket=/x"]) == [
        "sudo nbd-client -N db 127.0.0.1 1 /dev/nbd0",
        "qemu-img info nbd://127.0.0.1:1/db",
        "nbdcopy disk.img nbd://127.0.0.1:1/db",
        "nbdcopy nbd://127.0.0.1:1/db disk.img",
    ]
    assert commands(["nbd+unix:///a?socket=/x y"])[:2] == [
        "sudo nbd-client -N a -unix '/x y' /dev/nbd0",
        "qemu-img info 'nbd+unix:///a?socket=/x y'",
    ]
