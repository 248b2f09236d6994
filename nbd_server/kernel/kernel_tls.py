"""TLS for a link that the kernel takes: OpenSSL shakes hands, and the kernel does the rest in the socket itself (kTLS).

The kernel's NBD client sends and receives on a socket of its own. A process in between that decrypts for it, which is
what nbd-client forks, is one more thing that dies, and that needs memory while the kernel waits for this very device to
give some back; and the end of a link would have to be carried through it. With kTLS the socket is the connection, as
without TLS: what holds for links (nbd_server/links.py) holds here.

Nothing may be left in user space when the kernel gets the socket. So OpenSSL has the kernel do its records from the
end of the handshake on, both ways; `check_offloaded` asks the kernel whether that is so. It is TLS 1.2: OpenSSL 3.0
hands over only the sending side of 1.3, and in 1.3 the other end may change its keys, which the kernel's NBD client
cannot follow. The ciphers are those of 1.3, and with forward secrecy.
Source: Linux, Documentation/networking/tls.rst; SSL_CTX_set_options(3), SSL_OP_ENABLE_KTLS.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from blockstore.errors import Conflict, InvalidRequest

#: SSL_OP_ENABLE_KTLS; Python has a name for it from 3.12 on.
_ENABLE_KTLS: Final = 1 << 3
#: What the kernel has had since it has TLS.
_CIPHERS: Final = "ECDHE+AESGCM"
# linux/socket.h, linux/tls.h
_SOL_TLS: Final = 282
_TLS_TX, _TLS_RX = 1, 2
_CRYPTO_INFO_BYTES: Final = 4

T = TypeVar("T")


def make_context(certificates: Path) -> ssl.SSLContext:
    """Of a client's directory, as `cairn pki issue client` makes it. Raises InvalidRequest."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= _ENABLE_KTLS
    try:
        context.load_verify_locations(certificates / "ca-cert.pem")
        if (certificates / "client-cert.pem").exists():
            context.load_cert_chain(
                certificates / "client-cert.pem", certificates / "client-key.pem", password=lambda: ""
            )
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"--tls-certificates {certificates}: ca-cert.pem, client-cert.pem and client-key.pem there cannot be used: "
            f"{error}"
        ) from error
    return context


async def start_tls(connection: socket.socket, certificates: Path, host: str) -> ssl.SSLSocket:
    """Shake hands on a connection (not blocking), which is taken over; `host` has to be in the server's certificate.

    Raises ssl.SSLError, which is an OSError, where either side does not trust the other.
    """
    context = make_context(certificates)
    wrapped = context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
    try:
        await _when_ready(wrapped, wrapped.do_handshake)
    except BaseException:
        wrapped.close()
        raise
    return wrapped


async def receive(connection: ssl.SSLSocket, most_bytes: int) -> bytes:
    """What comes next; nothing at the end."""
    return await _when_ready(connection, partial(connection.recv, most_bytes))


async def send(connection: ssl.SSLSocket, data: bytes) -> None:
    """All of it."""
    while data:
        sent = await _when_ready(connection, partial(connection.send, data))
        data = data[sent:]


def check_offloaded(connection: ssl.SSLSocket) -> None:
    """Raises Conflict where the kernel does not do both directions by itself, or OpenSSL holds some of what came."""
    try:
        for direction in (_TLS_TX, _TLS_RX):
            connection.getsockopt(_SOL_TLS, direction, _CRYPTO_INFO_BYTES)
    except OSError as error:
        raise Conflict(
            "this host cannot do TLS in its kernel, which its block devices need: `modprobe tls`, and OpenSSL 3 with "
            f"kTLS ({error})"
        ) from error
    if connection.pending():
        raise Conflict(f"{connection.pending()} bytes of the front-end would not reach the kernel: attach again")


async def _when_ready(connection: ssl.SSLSocket, step: Callable[[], T]) -> T:
    """What a step of OpenSSL comes to; it is made again whenever the socket is as far as it needs."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            return step()
        except ssl.SSLWantReadError:
            await _ready(loop.add_reader, loop.remove_reader, connection.fileno())
        except ssl.SSLWantWriteError:
            await _ready(loop.add_writer, loop.remove_writer, connection.fileno())


async def _ready(add: Callable[..., None], remove: Callable[[int], object], descriptor: int) -> None:
    ready = asyncio.get_running_loop().create_future()
    add(descriptor, ready.set_result, None)
    try:
        await ready
    finally:
        remove(descriptor)
