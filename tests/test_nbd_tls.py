"""TLS at the NBD port: what is told before it, what it takes to get through, and what a client may send instead."""

import asyncio
import os
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from blockstore.config import FrontEndSettings, Tls
from blockstore.errors import InvalidRequest
from blockstore.pki.uses import Use
from blockstore.units import MIB
from nbd_server import wire
from nbd_server.limits import Limits
from nbd_server.phases import Phase
from nbd_server.security import Security
from nbd_server.terms import Style, Terms
from nbd_server.wire import Command, Option, OptionReply
from tests.nbd_serving import LIMIT_S, Raw, Served, until
from tests.programs import require_programs
from tests.tls_serving import (
    Authority,
    client_context,
    go,
    listed,
    option_reply,
    serving_tls,
    starttls,
    under_tls,
)

FLAGS = wire.HANDSHAKE_FLAGS.to_bytes(4, "big")
GO_DISK = wire.serialize_option(Option.GO, b"\0\0\0\4disk\0\0")


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return uvloop.run if request.param == "uvloop" else asyncio.run


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "pki")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another one, of the same name."""
    return Authority(tmp_path_factory.mktemp("other") / "pki")


@pytest.fixture
def mine(authority: Authority) -> ssl.SSLContext:
    return client_context(authority.client("host-1"), authority.root)


# ---- through TLS


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_requests_under_tls(run: Callable[[Any], Any], authority: Authority, version: str) -> None:
    context = client_context(authority.client("host-1"), authority.root, version)
    content = os.urandom(MIB)

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await under_tls(served, context)
            assert raw.writer.get_extra_info("ssl_object").version() == version.replace("_", ".")
            assert (await go(raw))[0] == OptionReply.ACK
            raw.request(Command.WRITE, 4096, MIB)
            raw.send(content)
            assert await raw.reply() == (0, 0)
            raw.request(Command.READ, 4096, MIB, cookie=7)
            assert await raw.reader.readexactly(16) == wire.serialize_simple_reply(7)
            assert await raw.reader.readexactly(MIB) == content
            raw.request(Command.DISC, 0, 0)
            assert await raw.ended() == b""

    run(main())


def test_what_is_sent_with_the_end_of_the_tls_handshake_is_not_lost(
    run: Callable[[Any], Any], authority: Authority, mine: ssl.SSLContext
) -> None:
    """The client's Finished and its first options may come in one piece."""

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await starttls(served)
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            tls = mine.wrap_bio(incoming, outgoing, server_hostname="localhost")
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    raw.send(outgoing.read())
                    incoming.write(await raw.reader.read(65536))
            tls.write(wire.serialize_option(Option.LIST) * 300 + GO_DISK)
            raw.send(outgoing.read())
            answer = b""
            while answer.count(b"fixed") < 300 or not answer.endswith(wire.serialize_option_reply(7, OptionReply.ACK)):
                incoming.write(await raw.reader.read(65536))
                while piece := _decrypted(tls):
                    answer += piece
            raw.writer.close()

    run(main())


def _decrypted(tls: ssl.SSLObject) -> bytes:
    try:
        return tls.read(65536)
    except ssl.SSLWantReadError:
        return b""


def test_a_client_that_does_not_read_is_held_back_under_tls(
    run: Callable[[Any], Any], authority: Authority, mine: ssl.SSLContext
) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings(), unsent_bytes=256 << 10) as served:
            raw = await under_tls(served, mine)
            await go(raw)
            reading = cast(asyncio.Transport, raw.writer.transport)
            reading.pause_reading()
            for cookie in range(64):
                raw.request(Command.READ, 0, MIB, cookie)
            await until(lambda: served.server.in_flight_bytes > 0)
            await until(lambda: all(not each._client_reads for each in served.server._connections))
            assert served.unsent_bytes < Limits().in_flight_bytes + 2 * MIB, "as without TLS, and its records"
            reading.resume_reading()
            for cookie in range(64):
                assert await raw.reply(MIB) == (0, cookie)
            raw.writer.close()

    run(main())


# ---- before TLS


BEFORE = [
    (Option.LIST, b"", OptionReply.ERR_TLS_REQD),
    (Option.INFO, b"\0\0\0\4disk\0\0", OptionReply.ERR_TLS_REQD),
    (Option.GO, b"\0\0\0\4disk\0\0", OptionReply.ERR_TLS_REQD),
    (Option.GO, b"garbage", OptionReply.ERR_TLS_REQD),
    (Option.GO, bytes(20_000), OptionReply.ERR_TLS_REQD),
    (8, b"", OptionReply.ERR_TLS_REQD),
    (4711, b"what is this", OptionReply.ERR_TLS_REQD),
    (Option.STARTTLS, b"data", OptionReply.ERR_INVALID),
    (Option.ABORT, b"", OptionReply.ACK),
]


@pytest.mark.parametrize(("option", "data", "expected"), BEFORE)
def test_nothing_is_told_before_tls_where_it_is_required(
    authority: Authority, option: int, data: bytes, expected: int
) -> None:
    """NBD, "FORCEDTLS mode"."""

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await served.raw(None)
            raw.send(FLAGS + wire.serialize_option(option, data))
            assert (await option_reply(raw))[:2] == (option, expected)
            raw.writer.close()

    uvloop.run(main())


@pytest.mark.parametrize("sent", [FLAGS + wire.serialize_option(Option.EXPORT_NAME, b"disk"), bytes(4) + GO_DISK])
def test_who_cannot_be_told_is_dropped(authority: Authority, sent: bytes) -> None:
    """EXPORT_NAME has no errors, and who is not "fixed" knows none."""

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await served.raw(None)
            raw.send(sent)
            assert await raw.ended() == b""

    uvloop.run(main())


def test_tls_is_started_once(authority: Authority, mine: ssl.SSLContext) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await under_tls(served, mine)
            raw.send(wire.serialize_option(Option.STARTTLS))
            assert (await option_reply(raw))[1] == OptionReply.ERR_INVALID
            assert (await go(raw))[0] == OptionReply.ACK
            raw.writer.close()

    uvloop.run(main())


def test_where_it_is_offered_a_client_may_do_without(authority: Authority) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings(Tls.OFFER)) as served:
            plain = await served.client()
            assert await plain.read(0, 10) == bytes(10)
            await plain.close()
            raw = await under_tls(served, client_context(authority.client("host-1"), authority.root))
            assert await listed(raw) == ["disk", "other", "fixed"]
            raw.writer.close()

    uvloop.run(main())


def test_a_unix_socket_offers_what_tcp_requires(authority: Authority, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            await served.server.listen_unix(tmp_path / "nbd")
            raw = Raw(*await asyncio.open_unix_connection(str(tmp_path / "nbd")))
            await raw.reader.readexactly(18)
            raw.send(FLAGS)
            assert (await go(raw))[0] == OptionReply.ACK
            raw.writer.close()

    uvloop.run(main())


# ---- instead of TLS


@pytest.mark.parametrize(
    "injected", [wire.serialize_option(Option.LIST), GO_DISK, wire.serialize_option(Option.ABORT), b"\x16", bytes(5000)]
)
def test_what_comes_in_plain_behind_starttls_is_never_an_option(
    run: Callable[[Any], Any], authority: Authority, mine: ssl.SSLContext, injected: bytes
) -> None:
    """Somebody in between puts an option behind STARTTLS: were it kept, it would count as said under TLS."""

    async def main() -> None:
        async with serving_tls(authority.settings(Tls.OFFER)) as served:
            raw = await served.raw(None)
            raw.send(FLAGS + wire.serialize_option(Option.STARTTLS) + injected)
            assert await raw.ended() in (b"", wire.serialize_option_reply(Option.STARTTLS, OptionReply.ACK))
            late = await starttls(served)
            late.send(injected)
            with pytest.raises((OSError, EOFError)):
                await _start_and_list(late, mine)
            late.writer.close()
            await until(lambda: served.server.connection_count == 0)

    run(main())


async def _start_and_list(raw: Raw, context: ssl.SSLContext) -> list[str]:
    await raw.writer.start_tls(context, server_hostname="localhost")
    return await listed(raw)


def test_what_was_agreed_in_plain_is_forgotten(authority: Authority, mine: ssl.SSLContext) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings(Tls.OFFER)) as served:
            raw = await served.raw(None)
            asked = wire.serialize_option(Option.INFO, b"\0\0\0\x06disk@h\0\0")
            structured = wire.serialize_option(Option.STRUCTURED_REPLY)
            raw.send(FLAGS + structured + asked + wire.serialize_option(Option.STARTTLS))
            while (reply := await option_reply(raw))[0] != Option.STARTTLS:
                assert reply[1] in (OptionReply.INFO, OptionReply.ACK)
            (connection,) = served.server._connections
            before = connection._handshake.options
            assert (before.client, before.terms.style) == ("h", Style.STRUCTURED)
            await raw.writer.start_tls(mine, server_hostname="localhost")
            await listed(raw)
            after = connection._handshake.options
            assert (after.client, after.terms) == ("", Terms())
            raw.writer.close()

    uvloop.run(main())


@pytest.mark.parametrize("cut", [0, 1, 5, 100, -1])
def test_a_tls_handshake_that_breaks_off_or_stands_still(
    run: Callable[[Any], Any], authority: Authority, mine: ssl.SSLContext, cut: int
) -> None:
    """Both end it within the limit of the whole handshake, and nothing stays behind."""
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        mine.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    hello = outgoing.read()

    async def main() -> None:
        async with serving_tls(authority.settings(), handshake_s=0.4) as served:
            for ends in (True, False):
                raw = await _starttls_in_time(served)
                raw.send(hello[:cut])
                if ends:
                    raw.reset()
                else:
                    await raw.ended()
                await until(lambda: served.server.connection_count == 0)

    run(main())


async def _starttls_in_time(served: Served) -> Raw:
    """A machine that stands still lets the limit pass before."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await starttls(served)
            except (OSError, EOFError):
                await until(lambda: served.server.connection_count == 0)


def test_garbage_in_place_of_tls(authority: Authority, mine: ssl.SSLContext) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            for length in (1, 3, 5, 6, 100, 20_000):
                for first in (b"", b"\x16\x03\x01", b"\x15\x03\x03\x00\x02", b"\x17\x03\x03"):
                    raw = await starttls(served)
                    raw.send(first + os.urandom(length))
                    raw.writer.write_eof()
                    await raw.ended()
            await until(lambda: served.server.connection_count == 0)
            raw = await under_tls(served, mine)
            assert (await go(raw))[0] == OptionReply.ACK
            raw.writer.close()

    uvloop.run(main())


def test_a_server_ends_while_somebody_starts_tls(run: Callable[[Any], Any], authority: Authority) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await starttls(served)
            raw.send(b"\x16\x03\x01")
            async with asyncio.timeout(Limits().drain_s / 2):
                await served.server.close()
            await raw.ended()

    run(main())


def test_who_starts_tls_gives_way_when_there_are_too_many(authority: Authority, mine: ssl.SSLContext) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings(), connections=2) as served:
            raw = await under_tls(served, mine)
            await go(raw)
            waiting = await starttls(served)
            newer = await starttls(served)
            await waiting.ended()
            for each in (raw, newer):
                each.writer.close()

    uvloop.run(main())


def test_a_client_cannot_renegotiate(authority: Authority) -> None:
    """TLS 1.2: it costs a server far more than a client. openssl's own client asks for it, behind a relay."""
    require_programs("openssl")

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                raw = await starttls(served)
                await asyncio.gather(_pipe(reader, raw.writer), _pipe(raw.reader, writer))

            server = await asyncio.start_server(relay, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            place = authority.client("host-1")
            asking = await asyncio.create_subprocess_exec(
                "openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_2", "-CAfile", place / "ca-cert.pem",
                "-cert", place / "client-cert.pem", "-key", place / "client-key.pem",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said, _ = await asyncio.wait_for(asking.communicate(b"R\n"), LIMIT_S)
            assert b"Verify return code: 0 (ok)" in said
            assert b"no renegotiation" in said
            server.close()

    uvloop.run(main())


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except ConnectionError:
        pass  # the other end has gone: so does this one
    writer.close()


# ---- certificates


async def is_let_in(authority: Authority, context: ssl.SSLContext) -> bool:
    async with serving_tls(authority.settings()) as served:
        try:
            raw = await under_tls(served, context)
            allowed = (await go(raw))[0] == OptionReply.ACK
            raw.writer.close()
        except (OSError, EOFError):
            return False
        return allowed


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_who_is_let_in(authority: Authority, other: Authority, version: str, tmp_path: Path) -> None:
    wrong_purpose = authority.issue(Use.SERVER, "posing", (), out=tmp_path / "posing")
    for kind in ("cert", "key"):
        (wrong_purpose.directory / f"server-{kind}.pem").rename(wrong_purpose.directory / f"client-{kind}.pem")
    expired = authority.root / "old"
    clients = {
        "good": (authority.client("host-1"), True),
        "none": (None, False),
        "of another authority": (other.client("host-1"), False),
        "expired": (expired if expired.exists() else authority.expired_client("old"), False),
        "a server's": (wrong_purpose.directory, False),
    }
    for what, (place, expected) in clients.items():
        context = client_context(place, authority.root, version)
        assert uvloop.run(is_let_in(authority, context)) == expected, what


def test_without_an_authority_no_certificate_is_asked_for(authority: Authority) -> None:
    async def main() -> None:
        async with serving_tls(authority.settings(ask=False)) as served:
            raw = await under_tls(served, client_context(None, authority.root))
            assert (await go(raw))[0] == OptionReply.ACK
            raw.writer.close()

    uvloop.run(main())


def test_tls_1_1_is_refused(authority: Authority) -> None:
    context = client_context(authority.client("host-1"), authority.root)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    assert not uvloop.run(is_let_in(authority, context))


def test_settings_that_do_not_fit(authority: Authority, tmp_path: Path) -> None:
    server, cert, key = authority.server, authority.server / "server-cert.pem", authority.server / "server-key.pem"
    wrong: list[dict[str, Any]] = [
        {"tls": Tls.REQUIRE},
        {"tls": Tls.OFFER, "tls_cert": cert},
        {"tls_cert": cert},
        {"access": tmp_path / "x"},
        {"tls": Tls.REQUIRE, "tls_cert": cert, "tls_key": key, "access": tmp_path / "x"},
        {"tls": Tls.REQUIRE, "tls_cert": key, "tls_key": cert},
        {"tls": Tls.REQUIRE, "tls_cert": tmp_path / "missing", "tls_key": key},
        {"tls": Tls.REQUIRE, "tls_cert": cert, "tls_key": key, "tls_ca": key},
        {"tls": Tls.REQUIRE, "tls_cert": cert, "tls_key": authority.client("host-1") / "client-key.pem"},
        {"tls": Tls.REQUIRE, "tls_cert": cert, "tls_key": key, "tls_ca": server / "ca-cert.pem", "access": tmp_path},
    ]
    for values in wrong:
        with pytest.raises(InvalidRequest):
            Security(FrontEndSettings(**values))


def test_limits_have_a_time_for_the_end_of_tls() -> None:
    assert Limits().tls_end_s < Limits().drain_s


def test_a_client_that_ends_tls_while_requests_are_in_flight(
    run: Callable[[Any], Any], authority: Authority, mine: ssl.SSLContext
) -> None:
    """TLS ends both ways, so nothing can be answered; what is in flight ends all the same, and counts until then."""

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            raw = await under_tls(served, mine)
            await go(raw)
            served.volume.holding = True
            for cookie in range(8):
                raw.request(Command.READ, 0, MIB, cookie)
            await until(lambda: len(served.volume.held) == 8)
            raw.writer.close()
            await until(lambda: all(each.phase is Phase.CLOSED for each in served.server._connections))
            assert served.server.in_flight_requests == 8
            served.volume.release_all()
            await until(lambda: served.server.connection_count == 0)

    run(main())
