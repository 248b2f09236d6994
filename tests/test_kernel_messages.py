"""Netlink messages of the kernel's nbd driver: their bytes, written by hand from include/uapi/linux/nbd-netlink.h."""

import struct

import pytest

pytest.importorskip("pyroute2", reason="Linux only")

from nbd_server.kernel.messages import Command, NbdMessage, Request, to_message

_HEADER_BYTES = 16
_NESTED = 0x8000


def attribute(kind: int, value: bytes) -> bytes:
    """struct nlattr and its value, padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def body(request: Request) -> bytes:
    """All behind struct nlmsghdr."""
    message = to_message(request)
    message.encode()
    (length,) = struct.unpack_from("=I", message.data)
    return bytes(message.data[_HEADER_BYTES:length])


def test_connect() -> None:
    sent = body(
        Request(
            Command.CONNECT,
            index=3,
            sockets=[7],
            size_bytes=1 << 40,
            block_size_bytes=4096,
            server_flags=0x16D,
            timeout_s=0,
            dead_timeout_s=600,
            backend="cairn:vol-1:host",
        )
    )
    assert sent[:4] == struct.pack("=BBH", 1, 1, 0)
    rest = sent[4:]
    expected = [
        attribute(1, struct.pack("=I", 3)),
        attribute(2, struct.pack("=Q", 1 << 40)),
        attribute(3, struct.pack("=Q", 4096)),
        attribute(4, struct.pack("=Q", 0)),
        attribute(5, struct.pack("=Q", 0x16D)),
        attribute(8, struct.pack("=Q", 600)),
        attribute(10, b"cairn:vol-1:host\0"),
        attribute(7 | _NESTED, attribute(1 | _NESTED, attribute(1, struct.pack("=I", 7)))),
    ]
    assert sorted(_attributes(rest)) == sorted(expected)


def test_what_is_not_said_is_not_there() -> None:
    assert body(Request(Command.DISCONNECT, index=0)) == struct.pack("=BBH", 2, 1, 0) + attribute(1, bytes(4))
    assert body(Request(Command.RECONFIGURE, index=1, timeout_s=1)) == struct.pack("=BBH", 3, 1, 0) + attribute(
        1, struct.pack("=I", 1)
    ) + attribute(4, struct.pack("=Q", 1))


def test_a_dead_link_is_read() -> None:
    payload = struct.pack("=BBH", Command.LINK_DEAD, 1, 0) + attribute(1, struct.pack("=I", 9))
    message = NbdMessage(struct.pack("=IHHII", _HEADER_BYTES + len(payload), 30, 0, 0, 0) + payload)
    message.decode()
    assert (message["cmd"], message.get_attr("NBD_ATTR_INDEX")) == (Command.LINK_DEAD, 9)


def _attributes(data: bytes) -> list[bytes]:
    found = []
    while data:
        length = (struct.unpack_from("=H", data)[0] + 3) & ~3
        found.append(data[:length])
        data = data[length:]
    return found
