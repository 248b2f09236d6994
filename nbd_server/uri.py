"""NBD URIs, and what to type so that a client uses one. Pure.

Source: the NBD project's doc/uri.md: nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH; nbds is with TLS.
"""

import shlex
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from blockstore.config import DEFAULT_NBD_PORT
from blockstore.errors import InvalidRequest

#: Of a client, in the names that libnbd and qemu expect.
_CREDENTIALS: Final = ("ca-cert", "client-cert", "client-key")


@dataclass(frozen=True, slots=True)
class NbdTarget:
    """Where an export is: at a unix socket where `socket_path` is not empty, else at host and port."""

    export: str
    host: str = ""
    port: int = 0
    socket_path: str = ""
    tls: bool = False


def parse_uri(uri: str) -> NbdTarget:
    """The target that `uri` names. Raises InvalidRequest."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    tls = parts.scheme.startswith("nbds")
    if parts.scheme in ("nbd", "nbds") and parts.hostname:
        return NbdTarget(export, parts.hostname, parts.port or DEFAULT_NBD_PORT, tls=tls)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme in ("nbd+unix", "nbds+unix") and len(sockets) == 1:
        return NbdTarget(export, socket_path=sockets[0], tls=tls)
    raise InvalidRequest(
        f"{uri!r} is no NBD URI: expected nbd://HOST:PORT/EXPORT, nbds:// for TLS, or nbd+unix:///EXPORT?socket=PATH"
    )


def commands(uris: list[str]) -> list[str]:
    """What to type to use the first of `uris`: a block device by the kernel, a look, copies in and out."""
    if not uris:
        return []
    target, uri = parse_uri(uris[0]), shlex.quote(uris[0])
    if target.tls:
        return tls_commands(target)
    where = f"-unix {shlex.quote(target.socket_path)}" if target.socket_path else f"{target.host} {target.port}"
    return [
        f"sudo nbd-client -N {shlex.quote(target.export)} {where} /dev/nbd0",
        f"qemu-img info {uri}",
        f"nbdcopy disk.img {uri}",
        f"nbdcopy {uri} disk.img",
    ]


def tls_commands(target: NbdTarget, certificates: str = "DIR") -> list[str]:
    """The same, at a port with TLS. certificates: a client's directory, as `cairn pki issue` makes it."""
    authority, certificate, key = (shlex.quote(f"{certificates}/{name}.pem") for name in _CREDENTIALS)
    host = f"[{target.host}]" if ":" in target.host else target.host
    uri = shlex.quote(f"nbds://{host}:{target.port}/{quote(target.export)}?tls-certificates={quote(certificates)}")
    credentials = shlex.quote(f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates}")
    image = f"driver=nbd,server.type=inet,server.host={target.host},server.port={target.port},export={target.export}"
    options = f"-A {authority} -F {certificate} -K {key} -H {target.host} -b 4096"
    return [
        f"sudo nbd-client {options} -N {shlex.quote(target.export)} {target.host} {target.port} /dev/nbd0",
        f"qemu-img info --object {credentials} --image-opts {shlex.quote(f'{image},tls-creds=tls0')}",
        f"nbdcopy disk.img {uri}",
        f"nbdcopy {uri} disk.img",
    ]
