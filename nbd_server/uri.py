"""NBD URIs, and what to type so that a client uses one. Pure.

Source: the NBD project's doc/uri.md: nbd://HOST[:PORT]/EXPORT and nbd+unix:///EXPORT?socket=PATH.
"""

import shlex
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from blockstore.config import DEFAULT_NBD_PORT
from blockstore.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class NbdTarget:
    """Where an export is: at a unix socket where `socket_path` is not empty, else at host and port."""

    export: str
    host: str = ""
    port: int = 0
    socket_path: str = ""


def parse_uri(uri: str) -> NbdTarget:
    """The target that `uri` names. Raises InvalidRequest."""
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd" and parts.hostname:
        return NbdTarget(export, parts.hostname, parts.port or DEFAULT_NBD_PORT)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme == "nbd+unix" and len(sockets) == 1:
        return NbdTarget(export, socket_path=sockets[0])
    raise InvalidRequest(f"{uri!r} is no NBD URI: expected nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")


def commands(uris: list[str]) -> list[str]:
    """What to type to use the first of `uris`: a block device by the kernel, a look, copies in and out."""
    if not uris:
        return []
    target, uri = parse_uri(uris[0]), shlex.quote(uris[0])
    where = f"-unix {shlex.quote(target.socket_path)}" if target.socket_path else f"{target.host} {target.port}"
    return [
        f"sudo nbd-client -N {shlex.quote(target.export)} {where} /dev/nbd0",
        f"qemu-img info {uri}",
        f"nbdcopy disk.img {uri}",
        f"nbdcopy {uri} disk.img",
    ]
