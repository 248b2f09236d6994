"""NBD URIs and the lines to try."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore.control.messages import export_uri
from blockstore.errors import InvalidRequest
from nbd_server.uri import NbdTarget, commands, make_uri, parse_uri, snapshot_commands, tls_commands


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("nbd://127.0.0.1:4567/db", NbdTarget("db", "127.0.0.1", 4567)),
        ("nbd://[::1]:1/a%20b", NbdTarget("a b", "::1", 1)),
        ("nbd://host", NbdTarget("", "host", 10809)),
        ("nbds://host/db", NbdTarget("db", "host", 10809, tls=True)),
        ("nbds+unix:///db?socket=/x", NbdTarget("db", socket_path="/x", tls=True)),
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
        "sudo nbd-client -b 4096 -N db 127.0.0.1 1 /dev/nbd0",
        "qemu-img info nbd://127.0.0.1:1/db",
        "nbdcopy disk.img nbd://127.0.0.1:1/db",
        "nbdcopy nbd://127.0.0.1:1/db disk.img",
    ]
    assert commands(["nbd+unix:///a?socket=/x y"])[:2] == [
        "sudo nbd-client -b 4096 -N a -unix '/x y' /dev/nbd0",
        "qemu-img info 'nbd+unix:///a?socket=/x%20y'",
    ]


def test_commands_to_look_into_a_snapshot() -> None:
    snapshot = "snap-0123456789abcdef0"
    assert snapshot_commands([]) == []
    assert snapshot_commands([f"nbd://[::1]:1/{snapshot}"]) == [
        f"sudo nbd-client -b 4096 -N {snapshot}+rw ::1 1 /dev/nbd0 && sudo mount /dev/nbd0 /mnt",
        f"qemu-img info 'nbd://[::1]:1/{snapshot}'",
        f"nbdcopy 'nbd://[::1]:1/{snapshot}' disk.img",
    ]
    device, look, copy = snapshot_commands([f"nbds://host:1/{snapshot}"])
    assert f"-N {snapshot}+rw host 1 /dev/nbd0 && sudo mount" in device
    assert f"export={snapshot}" in look
    assert f"nbds://host:1/{snapshot}?tls" in copy


@given(st.text(max_size=20), st.text(min_size=1, max_size=20), st.booleans())
def test_a_target_is_the_same_after_its_uri(export: str, path: str, tls: bool) -> None:
    for target in (NbdTarget(export, "::1", 1, tls=tls), NbdTarget(export, socket_path="/" + path, tls=tls)):
        assert parse_uri(make_uri(target)) == target
        assert make_uri(target).isascii()
        assert not set(make_uri(target)) & set(" \"'<>")


@pytest.mark.parametrize(
    ("server", "uri"),
    [
        ("nbd://127.0.0.1:1", "nbd://127.0.0.1:1/a%20b"),
        ("nbds://[::1]:1", "nbds://[::1]:1/a%20b"),
        (make_uri(NbdTarget("", socket_path="/x y/s?k")), "nbd+unix:///a%20b?socket=/x%20y/s%3Fk"),
        ("nbd+unix://?socket=/s", "nbd+unix:///a%20b?socket=/s"),
    ],
)
def test_control_puts_an_export_into_a_servers_uri(server: str, uri: str) -> None:
    assert export_uri(server, "a b") == uri
    assert parse_uri(uri).export == "a b"


def test_commands_with_tls() -> None:
    client, info, there, back = commands(["nbds://10.0.0.1:1/db"])
    assert "-tlshostname 10.0.0.1 -b 4096 -N db 10.0.0.1 1 /dev/nbd0" in client
    assert info == (
        "qemu-img info --object tls-creds-x509,id=tls0,endpoint=client,dir=DIR --image-opts "
        "driver=nbd,server.type=inet,server.host=10.0.0.1,server.port=1,export=db,tls-creds=tls0"
    )
    assert there == "nbdcopy disk.img 'nbds://10.0.0.1:1/db?tls-certificates=DIR'"
    assert back == "nbdcopy 'nbds://10.0.0.1:1/db?tls-certificates=DIR' disk.img"
    assert (
        "'nbds://[::1]:1/a%20b?tls-certificates=/x%20y'"
        in tls_commands(NbdTarget("a b", "::1", 1, tls=True), "/x y")[2]
    )
    assert "dir=/a,,b" in tls_commands(NbdTarget("c", "h", 1, tls=True), "/a,b")[1], "qemu takes commas for its own"
