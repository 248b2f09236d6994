"""NBD URIs, and what to type so that a client uses one. Pure.

Source: the NBD project's doc/uri.md: nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH; nbds is with TLS.
"""

import shlex
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from blockstore.config import DEFAULT_NBD_PORT, join_address
from blockstore.errors import InvalidRequest

#: Behind a snapshot's id: a clone of the connection's own that can be written to.
CLONE: Final = "+rw"
#: In a path as it is; everything else of a name or a socket's path is escaped.
_AS_IT_IS: Final = "/+"
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


def make_uri(target: NbdTarget) -> str:
    """The reverse of parse_uri."""
    scheme, export = "nbds" if target.tls else "nbd", quote(target.export, _AS_IT_IS)
    if target.socket_path:
        return f"{scheme}+unix:///{export}?socket={quote(target.socket_path)}"
    return f"{scheme}://{join_address(target.host, target.port)}/{export}"


def with_certificates(uri: str, directory: str) -> str:
    """The URI for libnbd's programs, and those that take theirs. directory: a client's, by `cairn pki issue`."""
    return f"{uri}?tls-certificates={quote(directory)}"


def commands(uris: list[str]) -> list[str]:
    """What to type to use the first of `uris`: a block device by the kernel, a look, copies in and out."""
    return _commands(parse_uri(uris[0])) if uris else []


def snapshot_commands(uris: list[str]) -> list[str]:
    """What to type to look into the snapshot that is at the first of `uris`: mount it, look, copy it out.

    A file system that was in use wants to write its journal back when it is mounted: into a clone.
    """
    if not uris:
        return []
    target = parse_uri(uris[0])
    device = _commands(replace(target, export=target.export + CLONE))[0]
    _, look, _, copy = _commands(target)
    return [f"{device} && sudo mount /dev/nbd0 /mnt", look, copy]


def _commands(target: NbdTarget) -> list[str]:
    if target.tls:
        return tls_commands(target)
    uri = shlex.quote(make_uri(target))
    where = f"-unix {shlex.quote(target.socket_path)}" if target.socket_path else f"{target.host} {target.port}"
    return [
        f"sudo nbd-client -b 4096 -N {shlex.quote(target.export)} {where} /dev/nbd0",
        f"qemu-img info {uri}",
        f"nbdcopy disk.img {uri}",
        f"nbdcopy {uri} disk.img",
    ]


def tls_commands(target: NbdTarget, certificates: str = "DIR") -> list[str]:
    """The same, at a port with TLS. certificates: a client's directory, as `cairn pki issue` makes it."""
    authority, certificate, key = (shlex.quote(f"{certificates}/{name}.pem") for name in _CREDENTIALS)
    uri = shlex.quote(with_certificates(make_uri(target), certificates))
    directory, export = (text.replace(",", ",,") for text in (certificates, target.export))  # as qemu-options has it
    credentials = shlex.quote(f"tls-creds-x509,id=tls0,endpoint=client,dir={directory}")
    image = f"driver=nbd,server.type=inet,server.host={target.host},server.port={target.port},export={export}"
    # Of its short options for these, nbd-client 3.24 knows only some.
    options = f"-cacertfile {authority} -certfile {certificate} -keyfile {key} -tlshostname {target.host} -b 4096"
    return [
        f"sudo nbd-client {options} -N {shlex.quote(target.export)} {target.host} {target.port} /dev/nbd0",
        f"qemu-img info --object {credentials} --image-opts {shlex.quote(f'{image},tls-creds=tls0')}",
        f"nbdcopy disk.img {uri}",
        f"nbdcopy {uri} disk.img",
    ]
