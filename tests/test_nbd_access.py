"""Rules on who may use what: how they are read, what they allow, and what becomes of clients when they change."""

import asyncio
import ssl
from pathlib import Path

import pytest
import uvloop

from blockstore.config import Tls
from blockstore.errors import InvalidRequest
from blockstore.pki.uses import Use
from nbd_server import wire
from nbd_server.access import Access, Peer, Session, parse_rules
from nbd_server.exports import Export
from nbd_server.handshake import Handshake
from nbd_server.handshake_states import State
from nbd_server.security import Security
from nbd_server.wire import Command, Option, OptionReply, TransmissionFlag, WireError
from tests.nbd_client import NbdError
from tests.test_nbd_handshake import Elsewhere
from tests.tls_serving import Authority, client_context, go, listed, serving_tls, under_tls

RULES = """
[[rule]]
client = "host-1"
volumes = ["disk", "sna?-*"]

[[rule]]
subject = "CN=host-2,O=Example"
volumes = ["*"]
read_only = true

[[rule]]
client = "host-2"
volumes = ["disk"]

[[rule]]
tls = false
volumes = ["other"]
"""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "pki")


@pytest.mark.parametrize(
    ("peer", "names", "allowed"),
    [
        (Peer("host-1", "CN=host-1"), ["disk"], Access.WRITE),
        (Peer("host-1", "CN=host-1"), ["vol-1", "disk"], Access.WRITE),
        (Peer("host-1", "CN=host-1"), ["snap-7"], Access.WRITE),
        (Peer("host-1", "CN=host-1"), ["other"], Access.NONE),
        (Peer("host-1", "CN=host-1"), ["DISK"], Access.NONE),
        (Peer("host-1", "CN=host-1"), [], Access.NONE),
        (Peer("host-2", "CN=host-2,O=Example"), ["other"], Access.READ),
        (Peer("host-2", "CN=host-2,O=Example"), ["disk"], Access.WRITE),
        (Peer("host-2", "CN=host-2"), ["other"], Access.NONE),
        (Peer("host-3", "CN=host-3"), ["disk"], Access.NONE),
        (Peer("", ""), ["other"], Access.NONE),
        (None, ["other"], Access.WRITE),
        (None, ["disk"], Access.NONE),
    ],
)
def test_what_rules_allow(peer: Peer | None, names: list[str], allowed: Access) -> None:
    assert parse_rules(RULES).judge(peer, names) is allowed


def test_without_a_rule_nobody_is_let_in() -> None:
    assert parse_rules("").judge(Peer("host-1", "CN=host-1"), ["disk"]) is Access.NONE
    assert parse_rules("").judge(None, ["disk"]) is Access.NONE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[rule", "no TOML"),
        ("rule = 3", "tables and nothing else"),
        ("rule = [3]", "tables and nothing else"),
        ("[[rules]]\nclient = 'a'", "tables and nothing else"),
        ("[[rule]]\nclient = 'a'\nvolumes = ['x']\n[[rule]]\nclients = 'a'", "rule 2: 'clients' is no key"),
        ("[[rule]]\nvolumes = ['x']", "exactly one of"),
        ("[[rule]]\nclient = 'a'\nsubject = 'b'\nvolumes = ['x']", "exactly one of"),
        ("[[rule]]\nclient = 'a'\ntls = false\nvolumes = ['x']", "exactly one of"),
        ("[[rule]]\ntls = true\nvolumes = ['x']", "exactly one of"),
        ("[[rule]]\ntls = 'no'\nvolumes = ['x']", "exactly one of"),
        ("[[rule]]\nclient = ''\nvolumes = ['x']", "a text that is not empty"),
        ("[[rule]]\nclient = 3\nvolumes = ['x']", "a text that is not empty"),
        ("[[rule]]\nclient = 'a'", "volumes is a list"),
        ("[[rule]]\nclient = 'a'\nvolumes = 'x'", "volumes is a list"),
        ("[[rule]]\nclient = 'a'\nvolumes = []", "volumes is a list"),
        ("[[rule]]\nclient = 'a'\nvolumes = ['']", "volumes is a list"),
        ("[[rule]]\nclient = 'a'\nvolumes = ['x']\nread_only = 1", "read_only is true or false"),
    ],
)
def test_files_that_are_wrong(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        parse_rules(text)


def test_nothing_is_looked_up_for_who_may_not_have_it() -> None:
    """It costs others something."""
    names = Elsewhere()
    session = Session(Tls.OFFER, Peer("host-1", "CN=host-1"), parse_rules(RULES).judge)
    shaken = Handshake(names, session)
    shaken.receive_data(wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.GO, b"\0\0\0\3far\0\0"))
    assert shaken.state is State.OPTION_HEADER
    assert names.asked == []


def context_of(authority: Authority, name: str) -> ssl.SSLContext:
    return client_context(authority.client(name), authority.root)


def test_a_client_sees_and_gets_what_its_rules_say(authority: Authority, tmp_path: Path) -> None:
    rules = tmp_path / "access.toml"
    rules.write_text(
        '[[rule]]\nclient = "host-1"\nvolumes = ["disk"]\n'
        '[[rule]]\nclient = "host-1"\nvolumes = ["by-alias"]\nread_only = true\n'
    )

    async def main() -> None:
        async with serving_tls(authority.settings(access=rules)) as served:
            device = served.exports.remove("other").device
            served.exports.add(Export("other", device, aliases=("other", "by-alias")))
            raw = await under_tls(served, context_of(authority, "host-1"))
            assert await listed(raw) == ["disk", "other"]
            assert (await go(raw, "fixed"))[0] == OptionReply.ERR_POLICY
            assert (await go(raw, "none such"))[0] == OptionReply.ERR_POLICY, "as what is there and not for it"
            assert (await go(raw, "by-alias"))[0] == OptionReply.ERR_UNKNOWN
            reply, flags = await go(raw, "other")
            assert reply == OptionReply.ACK
            assert flags & TransmissionFlag.READ_ONLY
            raw.request(Command.TRIM, 0, 4096, cookie=1)
            assert await raw.reply() == (WireError.EPERM, 1)
            raw.request(Command.READ, 0, 4096, cookie=2)
            assert await raw.reply(4096) == (0, 2)
            raw.writer.close()
            stranger = await under_tls(served, context_of(authority, "host-9"))
            assert await listed(stranger) == []
            assert (await go(stranger))[0] == OptionReply.ERR_POLICY
            stranger.send(wire.serialize_option(Option.EXPORT_NAME, b"disk"))
            assert await stranger.ended() == b""

    uvloop.run(main())


def test_some_exports_by_tls_alone(authority: Authority, tmp_path: Path) -> None:
    """NBD, "SELECTIVETLS mode"."""
    rules = tmp_path / "access.toml"
    rules.write_text(RULES)

    async def main() -> None:
        async with serving_tls(authority.settings(Tls.OFFER, rules)) as served:
            plain = await served.client("other")
            await plain.close()
            for name in ("disk", "none such"):
                with pytest.raises(NbdError) as caught:
                    await served.client(name)
                assert caught.value.errno == OptionReply.ERR_TLS_REQD
            raw = await served.raw(None)
            raw.send(wire.HANDSHAKE_FLAGS.to_bytes(4, "big"))
            assert await listed(raw) == ["other"]
            raw.writer.close()
            raw = await under_tls(served, context_of(authority, "host-1"))
            assert (await go(raw, "other"))[0] == OptionReply.ERR_POLICY
            assert (await go(raw, "disk"))[0] == OptionReply.ACK
            raw.writer.close()

    uvloop.run(main())


def test_who_loses_its_right_is_disconnected(authority: Authority, tmp_path: Path) -> None:
    rules = tmp_path / "access.toml"
    rules.write_text('[[rule]]\nclient = "host-1"\nvolumes = ["disk"]\n')

    async def main() -> None:
        async with serving_tls(authority.settings(access=rules)) as served:
            served.server.watch_files()
            kept = await under_tls(served, context_of(authority, "host-1"))
            lost = await under_tls(served, context_of(authority, "host-1"))
            assert (await go(kept, "disk"))[0] == OptionReply.ACK
            rules.write_text("[[rule]] this is broken")
            await asyncio.sleep(0)
            served.server.reload()
            assert served.server.connection_count == 2, "a file that is broken changes nothing"
            rules.write_text('[[rule]]\nclient = "host-1"\nvolumes = ["disk", "other"]\n')
            served.server.reload()
            assert (await go(lost, "other"))[0] == OptionReply.ACK
            rules.write_text(
                '[[rule]]\nclient = "host-1"\nvolumes = ["disk"]\n[[rule]]\nclient = "x"\nvolumes = ["*"]\n'
            )
            assert await lost.ended() == b"", "which is seen without being told"
            kept.request(Command.READ, 0, 4096, cookie=2)
            assert await kept.reply(4096) == (0, 2)
            rules.write_text('[[rule]]\nclient = "host-1"\nvolumes = ["disk"]\nread_only = true\n')
            served.server.reload()
            assert await kept.ended() == b"", "it was told that it may write"

    uvloop.run(main())


def test_certificates_are_replaced_while_it_runs(authority: Authority, tmp_path: Path) -> None:
    place = tmp_path / "server"
    issue = authority.issue(Use.SERVER, "fe-2", ("localhost",), out=place)
    settings = authority.settings()
    settings = type(settings)(
        tls=Tls.REQUIRE, tls_cert=issue.certificate, tls_key=issue.key, tls_ca=place / "ca-cert.pem"
    )
    context = context_of(authority, "host-1")

    async def main() -> None:
        async with serving_tls(settings) as served:

            async def serial() -> str:
                raw = await under_tls(served, context)
                shown = raw.writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
                raw.writer.close()
                return str(shown)

            first = await serial()
            newer = authority.issue(Use.SERVER, "fe-2", ("localhost",), out=tmp_path / "newer")
            issue.certificate.write_bytes(newer.certificate.read_bytes())
            served.server.reload()
            assert await serial() == first, "its key is not there yet"
            issue.key.write_bytes(newer.key.read_bytes())
            served.server.watch_files()
            second = await serial()
            assert int(second, 16) == newer.description.serial
            issue.certificate.unlink()
            served.server.reload()
            assert await serial() == second

    uvloop.run(main())


def test_files_are_read_when_they_change_and_only_then(authority: Authority, tmp_path: Path) -> None:
    rules = tmp_path / "access.toml"
    rules.write_text(RULES)
    security = Security(authority.settings(access=rules))
    assert not security.refresh()
    assert security.refresh(even_if_unchanged=True)
    rules.write_text(RULES + "# longer")
    assert security.refresh()
    assert not security.refresh()
    rules.write_text("broken")
    assert not security.refresh()
    assert security.judge(Peer("host-1"), ["disk"]) is Access.WRITE
