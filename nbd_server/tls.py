"""TLS at the server's end: the context of its connections, starting it, and who a client's certificate says it is.

TLS 1.2 and 1.3 with forward secrecy, no renegotiation, no compression, no session tickets: a connection lasts for days,
so nothing is gained by resuming one, and a resumed one would not show its certificate again. With authorities a client
has to show a certificate of theirs (RFC 8446, section 4.3.2), else none is asked for.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Final

import structlog

from blockstore.errors import InvalidRequest
from nbd_server.access import Peer
from nbd_server.limits import Limits

_log = structlog.get_logger(__name__)

#: What TLS 1.2 may use; all of 1.3's are good.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


def make_context(certificate: Path, key: Path, authorities: Path | None) -> ssl.SSLContext:
    """A server's context out of PEM files. Raises InvalidRequest where they cannot be read or do not fit together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.set_ciphers(_CIPHERS)
    try:
        # Else OpenSSL would ask at the terminal for a passphrase, and the server stand still.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--tls-cert {certificate} and --tls-key {key} cannot be used: {_why(error)}") from error
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"--tls-ca {authorities} cannot be used: {_why(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


async def start_tls(
    transport: asyncio.Transport, protocol: asyncio.BaseProtocol, context: ssl.SSLContext, limits: Limits
) -> tuple[asyncio.Transport, Peer] | None:
    """The transport of a client that was told to start TLS, and who it is; None where it did not succeed.

    `protocol` is told of what comes under TLS from now on, maybe before this returns.
    """
    loop = asyncio.get_running_loop()
    try:
        upgraded = await loop.start_tls(
            transport,
            protocol,
            context,
            server_side=True,
            ssl_handshake_timeout=limits.handshake_s,
            ssl_shutdown_timeout=limits.tls_end_s,
        )
        # Where the connection ends meanwhile, it returns all the same, with a transport that has no TLS or with none.
        tls = upgraded.get_extra_info("ssl_object") if upgraded else None
        return None if upgraded is None or tls is None else (upgraded, peer_of(tls.getpeercert(binary_form=True)))
    except (
        OSError,
        ValueError,
    ) as error:  # OpenSSL's are of the first kind, a subject that cannot be read of the second
        _log.info("TLS was not established", error=str(error) or type(error).__name__)
        return None


def peer_of(certificate: bytes | None) -> Peer:
    """Whom a certificate (DER) that was verified means; nobody in particular where there is none.

    Raises ValueError for one that OpenSSL understands and `cryptography` does not.
    """
    if not certificate:
        return Peer()
    # Most front-ends have no TLS, and each starts faster without it.
    from cryptography import x509  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        subject = x509.load_der_x509_certificate(certificate).subject
    except (TypeError, x509.InvalidVersion) as error:
        raise ValueError(str(error)) from error
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    # One with several common names could be read in several ways.
    return Peer(str(names[0].value) if len(names) == 1 else "", subject.rfc4514_string())


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
