"""The client's side of TLS: what it believes, whom it trusts, and when the kernel gets the socket."""

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from blockstore.errors import Conflict, InvalidRequest, QuorumUnavailable
from blockstore.rpc import control_pb2 as pb
from nbd_server import wire
from nbd_server.kernel import kernel_tls, session
from nbd_server.kernel.devices import Owner
from nbd_server.kernel.link import open_link, probe
from nbd_server.kernel.negotiation import Negotiation, Refused
from nbd_server.kernel.whereabouts import Place, place_of
from nbd_server.uri import NbdTarget
from nbd_server.wire import Option, OptionReply, ProtocolError
from tests.nbd_serving import LIMIT_S, SIZE, serving
from tests.tls_serving import Authority, serving_tls

TLS_AGREED = wire.serialize_option_reply(Option.STARTTLS, OptionReply.ACK)
GREETING = wire.serialize_greeting()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pki") / "pki")


def test_nothing_is_asked_for_in_plain() -> None:
    client = Negotiation("vol-1", tls=True)
    client.receive_data(GREETING)
    assert client.data_to_send() == wire.HANDSHAKE_FLAGS.to_bytes(4, "big") + wire.serialize_option(Option.STARTTLS)
    client.receive_data(TLS_AGREED)
    assert client.must_start_tls
    assert client.data_to_send() == b""
    client.tls_started()
    assert client.data_to_send()[8:12] == Option.GO.to_bytes(4, "big")


@pytest.mark.parametrize(
    "said",
    [
        TLS_AGREED + b"x",
        TLS_AGREED + wire.serialize_option_reply(Option.GO, OptionReply.ACK),
        wire.serialize_option_reply(Option.STARTTLS, OptionReply.INFO, wire.serialize_info_export(1, 1)),
        wire.serialize_option_reply(Option.GO, OptionReply.INFO, wire.serialize_info_export(1, 1)),
        wire.serialize_option_reply(Option.GO, OptionReply.ACK),
    ],
)
def test_what_a_server_says_in_plain_is_not_believed(said: bytes) -> None:
    with pytest.raises(ProtocolError):
        Negotiation("vol-1", tls=True).receive_data(GREETING + said)


def test_a_server_that_says_it_has_no_tls() -> None:
    """Or somebody in between, for all that is known."""
    refused = wire.serialize_option_reply(Option.STARTTLS, OptionReply.ERR_POLICY)
    with pytest.raises(Refused):
        Negotiation("vol-1", tls=True).receive_data(GREETING + refused)


def test_whom_it_trusts(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "ca-cert.pem").write_bytes((authority.root / "ca-cert.pem").read_bytes())
    good = authority.client("host-1")

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            target = NbdTarget("disk", "localhost", served.port, tls=True)
            assert (await probe(target, "host-1", LIMIT_S, good)).size_bytes == SIZE
            elsewhere = NbdTarget("disk", "127.0.0.2", served.port, tls=True)
            for where, place in ((target, bare), (target, other.client("host-1")), (elsewhere, good)):
                with pytest.raises(QuorumUnavailable, match="cannot be used"):
                    await probe(where, "host-1", LIMIT_S, place)
            for wrong in (None, tmp_path, tmp_path / "missing"):
                with pytest.raises(InvalidRequest, match="--tls-certificates"):
                    await probe(target, "host-1", LIMIT_S, wrong)
            silent = await asyncio.start_server(_agree_and_stop, "127.0.0.1", 0)
            hung = NbdTarget("disk", "127.0.0.1", silent.sockets[0].getsockname()[1], tls=True)
            with pytest.raises(QuorumUnavailable, match=r"no answer in 0\.3 s"):
                await probe(hung, "host-1", 0.3, good)
            silent.close()
        async with serving() as served:
            with pytest.raises(Conflict, match="no certificate"):
                await probe(NbdTarget("disk", "localhost", served.port, tls=True), "host-1", LIMIT_S, good)

    asyncio.run(main())


async def _agree_and_stop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(GREETING)
    await reader.readexactly(20)
    writer.write(TLS_AGREED)


def test_a_socket_without_kernel_tls_is_not_handed_over(authority: Authority) -> None:
    """Whether this machine's kernel has it or not."""
    context = kernel_tls.make_context(authority.client("host-1"))
    context.options &= ~kernel_tls._ENABLE_KTLS

    async def main() -> None:
        async with serving_tls(authority.settings()) as served:
            connection = socket.create_connection(("127.0.0.1", served.port))
            wrapped = context.wrap_socket(connection, server_hostname="localhost", do_handshake_on_connect=False)
            with wrapped, pytest.raises(Conflict, match="modprobe tls"):
                kernel_tls.check_offloaded(wrapped)
            target = NbdTarget("disk", "localhost", served.port, tls=True)
            try:
                link = await open_link(target, "host-1", LIMIT_S, authority.client("host-1"))
            except Conflict:
                return
            assert not isinstance(link.socket, ssl.SSLSocket)
            link.cut()

    asyncio.run(main())


def test_which_ports_are_used() -> None:
    uris = ["nbds://10.0.0.1:1/v", "nbd://10.0.0.1:1/v", "nbd+unix:///v?socket=/run/x"]
    volume = pb.Volume(attachment=pb.Attachment(front_end="fe", epoch=1, uris=uris))
    unix = NbdTarget("v", socket_path="/run/x")
    assert place_of(volume).targets == (unix, NbdTarget("v", "10.0.0.1", 1))
    assert place_of(volume, tls=True).targets == (unix, NbdTarget("v", "10.0.0.1", 1, tls=True))


def test_a_host_without_certificates_hears_what_it_lacks() -> None:
    place = Place("fe-1", 1, SIZE, ())
    with pytest.raises(QuorumUnavailable, match="give --tls-certificates DIR"):
        asyncio.run(session._first_links(place, Owner("vol-1", "host-1"), None))
    with pytest.raises(QuorumUnavailable, match="leave --tls-certificates out"):
        asyncio.run(session._first_links(place, Owner("vol-1", "host-1"), Path("pki")))
