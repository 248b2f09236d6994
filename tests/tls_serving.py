"""For tests of TLS: authorities with certificates, a server that asks for them, a client that starts TLS by hand."""

import asyncio
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from blockstore.config import FrontEndSettings, Tls
from blockstore.pki import certificates, directory
from blockstore.pki.uses import Use
from nbd_server import wire
from nbd_server.security import Security
from nbd_server.wire import Option, OptionReply
from tests.nbd_serving import LIMIT_S, Raw, Served, serving

DAY = timedelta(days=1)
HOSTS = ("localhost", "127.0.0.1")


class Authority:
    """One with a server's certificate for this host."""

    def __init__(self, root: Path, name: str = "Test CA") -> None:
        self.root = root
        self._name = name
        directory.init(root, name, 3650 * DAY)
        self.server = self.issue(Use.SERVER, "fe-1", HOSTS).directory

    def issue(self, use: Use, name: str, hosts: tuple[str, ...] = (), out: Path | None = None) -> directory.Issued:
        return directory.issue(self.root, use, name, hosts, lifetime=30 * DAY, out=out)

    def client(self, name: str) -> Path:
        """The directory of a client's certificate, made where it is not there."""
        place = self.root / name
        return place if place.exists() else self.issue(Use.CLIENT, name).directory

    def expired_client(self, name: str) -> Path:
        """One whose certificate has run out."""
        made = self.issue(Use.CLIENT, name)
        pair = certificates.Pair((self.root / "ca-cert.pem").read_bytes(), (self.root / "ca-key.pem").read_bytes())
        old = certificates.Pair(made.certificate.read_bytes(), made.key.read_bytes())
        past = datetime.now(UTC) - 10 * DAY
        made.certificate.write_bytes(certificates.renew(pair, old, DAY, past).certificate)
        return made.directory

    def settings(self, tls: Tls = Tls.REQUIRE, access: Path | None = None, *, ask: bool = True) -> FrontEndSettings:
        """Of a front-end with the server's certificate; ask: clients for theirs."""
        return FrontEndSettings(
            tls=tls,
            tls_cert=self.server / "server-cert.pem",
            tls_key=self.server / "server-key.pem",
            tls_ca=self.server / "ca-cert.pem" if ask else None,
            access=access,
        )


def client_context(certificates_of: Path | None, trusted: Path, version: str = "TLSv1_3") -> ssl.SSLContext:
    """A client's; certificates_of: its directory, None: it has none. trusted: a directory with an authority's."""
    context = ssl.create_default_context(cafile=str(trusted / "ca-cert.pem"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    if certificates_of is not None:
        context.load_cert_chain(certificates_of / "client-cert.pem", certificates_of / "client-key.pem")
    return context


@asynccontextmanager
async def serving_tls(settings: FrontEndSettings, **limits: Any) -> AsyncIterator[Served]:
    async with serving(security=Security(settings), **limits) as served:
        yield served


async def starttls(served: Served) -> Raw:
    """A client that was told to start TLS, and has not begun."""
    raw = await served.raw(None)
    raw.send(wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.STARTTLS))
    assert await option_reply(raw) == (Option.STARTTLS, OptionReply.ACK, b"")
    return raw


async def under_tls(served: Served, context: ssl.SSLContext) -> Raw:
    """A client under TLS, before its first option. Raises what ssl does."""
    raw = await starttls(served)
    async with asyncio.timeout(LIMIT_S):
        await raw.writer.start_tls(context, server_hostname="localhost")
    return raw


async def option_reply(raw: Raw) -> tuple[int, int, bytes]:
    """Option, reply and data."""
    async with asyncio.timeout(LIMIT_S):
        magic, option, reply, length = struct.unpack(">QIII", await raw.reader.readexactly(20))
        assert magic == wire.OPTION_REPLY_MAGIC
        return option, reply, await raw.reader.readexactly(length)


async def go(raw: Raw, export: str = "disk") -> tuple[int, int]:
    """Ask for an export: how that ended (an OptionReply), and its transmission flags."""
    name = export.encode()
    raw.send(wire.serialize_option(Option.GO, struct.pack(">I", len(name)) + name + b"\0\0"))
    flags = 0
    while True:
        _, reply, data = await option_reply(raw)
        if reply != OptionReply.INFO:
            return reply, flags
        if data[:2] == b"\0\0":
            flags = struct.unpack(">H", data[10:12])[0]


async def listed(raw: Raw) -> list[str]:
    """The names that LIST tells."""
    raw.send(wire.serialize_option(Option.LIST))
    names = []
    while (reply := await option_reply(raw))[1] == OptionReply.SERVER:
        names.append(reply[2][4:][: int.from_bytes(reply[2][:4], "big")].decode())
    assert reply[1] == OptionReply.ACK
    return names
