"""Where an etcd is, and as whom it is asked: the URL of `--metastore` and the options beside it.

    etcd://HOST:PORT,HOST:PORT/PREFIX       in the clear
    etcds://HOST:PORT,HOST:PORT/PREFIX      TLS

Every key of a cluster begins with its prefix (`/cairn` without one), so that several clusters, and others,
may share an etcd. A password is read from a file or the environment, never from the URL, which `ps` shows.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blockstore.config import ControlSettings, split_address
from blockstore.errors import InvalidRequest

PASSWORD_VARIABLE: Final = "CAIRN_METASTORE_PASSWORD"
DEFAULT_PREFIX: Final = "/cairn"
#: The rest of a key is the metastore's: etcd takes long keys, people do not.
MAX_PREFIX: Final = 64
_URL: Final = re.compile(r"(?P<scheme>etcds?)://(?P<members>[^/?#@]+)(?P<prefix>/[^?#]*)?")


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """members: HOST:PORT of each that may be asked. prefix: begins with a slash and ends without one.

    certificates: authorities, own chain and own key as PEM, None where none was given; only with tls.
    """

    members: tuple[str, ...]
    prefix: str = DEFAULT_PREFIX
    tls: bool = False
    authorities: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    user: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        return ",".join(self.members)


def read_address(settings: ControlSettings) -> EtcdAddress | None:
    """The etcd that the settings name; None where they name none. Raises InvalidRequest."""
    if not settings.metastore:
        return None
    found = _URL.fullmatch(settings.metastore)
    if found is None:
        raise InvalidRequest(
            f"--metastore {settings.metastore!r}: write it as etcd://HOST:PORT,HOST:PORT/PREFIX, or etcds:// for TLS"
        )
    members = tuple(found["members"].split(","))
    for each in members:
        split_address(each)
    tls = found["scheme"] == "etcds"
    files = (settings.metastore_ca_file, settings.metastore_cert_file, settings.metastore_key_file)
    if not tls and any(files):
        raise InvalidRequest(f"--metastore {settings.metastore!r} has no TLS, and files for it are given: use etcds://")
    if (files[1] is None) != (files[2] is None):
        raise InvalidRequest("--metastore-cert-file and --metastore-key-file are given together or not at all")
    authorities, certificate, key = (_read(each) if each else None for each in files)
    return EtcdAddress(
        members,
        _prefix(found["prefix"] or ""),
        tls,
        authorities,
        certificate,
        key,
        settings.metastore_user,
        _password(settings),
    )


def _prefix(text: str) -> str:
    prefix = text.rstrip("/") or DEFAULT_PREFIX
    if len(prefix) > MAX_PREFIX or not re.fullmatch(r"(/[A-Za-z0-9._-]+)+", prefix):
        raise InvalidRequest(
            f"the prefix {prefix!r} of --metastore: at most {MAX_PREFIX} letters, digits, '.', '_', '-' between slashes"
        )
    return prefix


def _password(settings: ControlSettings) -> str:
    if not settings.metastore_user:
        if settings.metastore_password_file:
            raise InvalidRequest("--metastore-password-file without --metastore-user: say whose password it is")
        return ""
    if settings.metastore_password_file:
        return _read(settings.metastore_password_file).decode().rstrip("\n")
    password = os.environ.get(PASSWORD_VARIABLE)
    if password is None:
        raise InvalidRequest(
            f"--metastore-user {settings.metastore_user!r} without a password: give --metastore-password-file, "
            f"or {PASSWORD_VARIABLE} in the environment"
        )
    return password


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
