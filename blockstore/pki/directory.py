"""Where certificates lie: the authority's directory, and one directory for each server and client.

    pki/ca-cert.pem  pki/ca-key.pem                      the authority; its key never leaves this machine
    pki/NAME/ca-cert.pem  NAME/server-cert.pem  NAME/server-key.pem
    pki/NAME/ca-cert.pem  NAME/client-cert.pem  NAME/client-key.pem

A client's directory is what libnbd (tls-certificates=DIR) and qemu (tls-creds-x509,dir=DIR) take as it is.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from blockstore.durable_files import sync_path
from blockstore.errors import AlreadyExists, InvalidRequest, NotFound
from blockstore.pki import certificates
from blockstore.pki.certificates import Description, Pair
from blockstore.pki.uses import Use

AUTHORITY_CERTIFICATE: Final = "ca-cert.pem"
AUTHORITY_KEY: Final = "ca-key.pem"
_SECRET: Final = 0o600
_PUBLIC: Final = 0o644


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and the directory that has it, with its key and the authority's certificate."""

    directory: Path
    description: Description

    @property
    def certificate(self) -> Path:
        return self.directory / certificate_name(_use(self.description))

    @property
    def key(self) -> Path:
        return self.directory / key_name(_use(self.description))


def certificate_name(use: Use) -> str:
    """The file's name, as qemu and libnbd expect it."""
    return AUTHORITY_CERTIFICATE if use is Use.AUTHORITY else f"{use.value}-cert.pem"


def key_name(use: Use) -> str:
    """The same, of its key."""
    return AUTHORITY_KEY if use is Use.AUTHORITY else f"{use.value}-key.pem"


def init(directory: Path, common_name: str, lifetime: timedelta) -> Issued:
    """Make an authority there. Raises AlreadyExists where the directory is there, and InvalidRequest."""
    made = certificates.make_authority(common_name, lifetime)
    _make_directory(directory, [(AUTHORITY_KEY, made.key, _SECRET), (AUTHORITY_CERTIFICATE, made.certificate, _PUBLIC)])
    return Issued(directory, certificates.describe(made.certificate))


def issue(
    pki: Path, use: Use, common_name: str, names: Sequence[str], *, lifetime: timedelta, out: Path | None = None
) -> Issued:
    """A certificate, its key and the authority's certificate in `out`, or in a directory of its name beside that one.

    Raises AlreadyExists where that is there, NotFound without an authority, and what `certificates.issue` does.
    """
    directory = out or pki / _file_name(common_name)
    authority = _authority(pki)
    made = certificates.issue(authority, use, common_name, names, lifetime=lifetime)
    files = [
        (key_name(use), made.key, _SECRET),
        (certificate_name(use), made.certificate, _PUBLIC),
        (AUTHORITY_CERTIFICATE, authority.certificate, _PUBLIC),
    ]
    _make_directory(directory, files)
    return Issued(directory, certificates.describe(made.certificate))


def renew(pki: Path, directory: Path, lifetime: timedelta) -> Issued:
    """Replace a directory's certificate by one for the same key that lasts longer; whoever reads it sees either.

    Raises NotFound where there is none, and what `certificates.renew` does.
    """
    found = [use for use in (Use.SERVER, Use.CLIENT) if (directory / certificate_name(use)).exists()]
    if not found:
        raise NotFound(f"{directory} has no certificate of a server or a client: `cairn pki show` lists what there is")
    paths = [(directory / certificate_name(use), directory / key_name(use)) for use in found]
    if len(paths) > 1:
        raise InvalidRequest(f"{directory} has certificates of a server and of a client: keep each in its own")
    ((certificate, key),) = paths
    made = certificates.renew(_authority(pki), Pair(_read(certificate), _read(key)), lifetime)
    _replace(certificate, made.certificate)
    return Issued(directory, certificates.describe(made.certificate))


def show(path: Path) -> list[tuple[Path, Description]]:
    """What each certificate in a file, or in a directory and those below it, says; an authority's copies once.

    Raises NotFound where there is none, and InvalidRequest for a file that is none.
    """
    if path.is_file():
        return [(path, certificates.describe(_read(path)))]
    found: dict[str, tuple[Path, Description]] = {}
    for each in _certificates_in(path):
        described = certificates.describe(_read(each))
        found.setdefault(described.fingerprint, (each, described))
    if not found:
        raise NotFound(f"no certificates in {path}: `cairn pki init` makes an authority")
    return list(found.values())


def _certificates_in(directory: Path) -> Iterator[Path]:
    for use in Use:
        if (directory / certificate_name(use)).is_file():
            yield directory / certificate_name(use)
    for each in sorted(directory.iterdir() if directory.is_dir() else ()):
        if each.is_dir():
            yield from (each / certificate_name(use) for use in Use if (each / certificate_name(use)).is_file())


def _use(description: Description) -> Use:
    assert description.use is not None, "what is made here has one purpose"
    return description.use


def _file_name(name: str) -> str:
    if "/" in name or name.startswith("."):
        raise InvalidRequest(f"{name!r} cannot be a directory's name: say with --out where its files go")
    return name


def _authority(pki: Path) -> Pair:
    for each in (AUTHORITY_CERTIFICATE, AUTHORITY_KEY):
        if not (pki / each).is_file():
            raise NotFound(f"{pki / each} is missing: make an authority with `cairn pki init {pki}`")
    return Pair(_read(pki / AUTHORITY_CERTIFICATE), _read(pki / AUTHORITY_KEY))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"{path} is missing") from error


def _make_directory(directory: Path, files: Sequence[tuple[str, bytes, int]]) -> None:
    """Make it with all of its files, or not at all. Raises AlreadyExists where it is there."""
    if os.path.lexists(directory):
        raise AlreadyExists(f"{directory} exists: nothing there is overwritten; choose another place or move it away")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))  # 0700
    try:
        for name, content, mode in files:
            _write(scratch / name, content, mode)
        sync_path(scratch)
        try:
            scratch.replace(directory)
        except OSError as error:
            raise AlreadyExists(f"{directory} was made by somebody else meanwhile: {error}") from error
    except BaseException:
        shutil.rmtree(scratch)
        raise
    sync_path(directory.parent)


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    _write(scratch, content, _PUBLIC)
    scratch.replace(path)
    sync_path(path.parent)


def _write(path: Path, content: bytes, mode: int) -> None:
    """A new file; nobody else may read it before its mode is what it is to be. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _SECRET)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
