"""A client's handshake against the server's, byte by byte, and links over real sockets."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockstore.errors import Conflict, NotFound, QuorumUnavailable
from nbd_server import wire
from nbd_server.handshake import Handshake
from nbd_server.handshake_states import State
from nbd_server.kernel.link import open_link, probe
from nbd_server.kernel.negotiation import Agreed, Negotiation, Refused
from nbd_server.links import link_name
from nbd_server.uri import NbdTarget
from nbd_server.wire import Option, OptionReply, ProtocolError
from tests.loopback import free_address
from tests.nbd_serving import LIMIT_S, SIZE, serving
from tests.test_nbd_handshake import Named, Names


def talk(client: Negotiation, names: Names, piece_bytes: int) -> Handshake[Named]:
    """The handshake between the two, in pieces of that size."""
    server: Handshake[Named] = Handshake(names)
    to_client, to_server = server.data_to_send(), b""
    while to_client or to_server:
        piece, to_client = to_client[:piece_bytes], to_client[piece_bytes:]
        client.receive_data(piece)
        to_server += client.data_to_send()
        piece, to_server = to_server[:piece_bytes], to_server[piece_bytes:]
        server.receive_data(piece)
        to_client += server.data_to_send()
    return server


@pytest.mark.parametrize("piece_bytes", [1, 7, 10_000])
def test_both_sides_agree(piece_bytes: int) -> None:
    client = Negotiation(link_name("ro", "host-1"))
    server = talk(client, Names(), piece_bytes)
    assert server.state is State.TRANSMISSION
    assert server.options.client == "host-1"
    assert client.agreed is not None
    assert client.agreed.size_bytes == 4096
    assert client.agreed.flags & wire.TransmissionFlag.READ_ONLY
    assert (client.agreed.minimum_block_bytes, client.agreed.preferred_block_bytes) == (1, 4096)


def test_asking_chooses_nothing() -> None:
    client = Negotiation("ro", Option.INFO)
    assert talk(client, Names(), 10_000).state is State.OPTION_HEADER
    assert client.agreed is not None


def test_refusals_are_told_apart() -> None:
    with pytest.raises(Refused) as unknown:
        talk(Negotiation("none"), Names(), 10_000)
    assert unknown.value.reply == OptionReply.ERR_UNKNOWN
    mine = Names(replace(Named("vol-1"), client="host-1"))
    for name in ("vol-1", link_name("vol-1", "host-2")):
        with pytest.raises(Refused) as refused:
            talk(Negotiation(name), mine, 10_000)
        assert refused.value.reply == OptionReply.ERR_POLICY
    client = Negotiation(link_name("vol-1", "host-1"))
    talk(client, mine, 10_000)
    assert isinstance(client.agreed, Agreed)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        wire.serialize_greeting()[:16] + b"\0\0",
        wire.serialize_greeting() + wire.serialize_option_reply(Option.LIST, OptionReply.ACK),
        wire.serialize_greeting() + wire.serialize_option_reply(Option.GO, OptionReply.ACK),
        wire.serialize_greeting() + wire.serialize_option_reply(Option.GO, OptionReply.SERVER, b"x"),
        wire.serialize_greeting() + (b"\0\3\xe8\x89\4\x55\x65\xa9\0\0\0\7\0\0\0\3\xff\xff\xff\xff"),
    ],
)
def test_what_is_no_handshake_is_refused(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        Negotiation("vol-1").receive_data(said)


def test_links_over_tcp() -> None:
    async def main() -> None:
        async with serving() as served:
            target = NbdTarget("disk", "127.0.0.1", served.port)
            first = await open_link(target, "host-1", LIMIT_S)
            assert (await probe(target, "host-1", LIMIT_S)).size_bytes == first.agreed.size_bytes == SIZE
            assert not first.is_dead(), "asking ends no link"
            second = await open_link(target, "host-1", LIMIT_S)
            await dead(first)
            assert not second.is_dead()
            second.cut()
            first.cut()
            with pytest.raises(NotFound, match="no export"):
                await open_link(NbdTarget("none", "127.0.0.1", served.port), "host-1", LIMIT_S)

    asyncio.run(main())


def test_a_link_over_a_unix_socket(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving() as served:
            path = tmp_path / "nbd.sock"
            await served.server.listen_unix(path)
            link = await open_link(NbdTarget("disk", socket_path=str(path)), "host-1", LIMIT_S)
            assert link.agreed.size_bytes == SIZE
            link.cut()
            with pytest.raises(QuorumUnavailable, match="cannot be used"):
                await open_link(NbdTarget("disk", socket_path=str(tmp_path / "none")), "host-1", LIMIT_S)

    asyncio.run(main())


def test_nobody_there_and_somebody_silent() -> None:
    async def main() -> None:
        host, _, port = free_address().rpartition(":")
        with pytest.raises(QuorumUnavailable, match="cannot be used"):
            await open_link(NbdTarget("disk", host, int(port)), "host-1", LIMIT_S)
        silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        with pytest.raises(QuorumUnavailable, match=r"no answer in 0\.2 s"):
            await open_link(NbdTarget("disk", *silent.sockets[0].getsockname()[:2]), "host-1", 0.2)
        silent.close()

    asyncio.run(main())


def test_somebody_elses_export_is_a_conflict() -> None:
    async def main() -> None:
        async with serving() as served:
            export = served.exports.remove("other")
            served.exports.add(replace(export, client="host-1"))
            with pytest.raises(Conflict, match="host-1"):
                await probe(NbdTarget("other", "127.0.0.1", served.port), "host-2", LIMIT_S)

    asyncio.run(main())


async def dead(link: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not link.is_dead():  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.005)
