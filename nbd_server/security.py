"""What a server asks of its clients: TLS and the rules on access, out of files that may change while it runs.

Invariant: what is in force is always whole. Files that cannot be used, such as a certificate whose key has not been
replaced yet, change nothing: what was in force stays, and the log says why. They are tried again once they change.
"""

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from blockstore.config import FrontEndSettings, Tls
from blockstore.errors import InvalidRequest
from nbd_server.access import Access, Judge, Peer, Session, anybody, parse_rules
from nbd_server.tls import make_context

_log = structlog.get_logger(__name__)

Seen = tuple[tuple[int, int, int] | None, ...]
"""Of each file: inode, size and time of its last change; None where it is not there."""


@dataclass(frozen=True, slots=True)
class Port:
    """One of a server's ways in, and what is asked of those who come by it. security: None where nothing is."""

    security: "Security | None" = None
    tls: Tls = Tls.NONE

    def session(self, peer: Peer | None = None) -> Session:
        """peer: who has started TLS; None before that."""
        return Session() if self.security is None else Session(self.tls, peer, self.security.judge)

    @property
    def context(self) -> ssl.SSLContext | None:
        """For a client that starts TLS now."""
        return None if self.security is None else self.security.context


class Security:
    """context: for the next connection that starts TLS; None without TLS."""

    def __init__(self, settings: FrontEndSettings) -> None:
        """Raises InvalidRequest where the settings do not fit together, or a file cannot be used."""
        _check(settings)
        self.tls = settings.tls
        self._settings = settings
        self._paths = [
            each for each in (settings.tls_cert, settings.tls_key, settings.tls_ca, settings.access) if each is not None
        ]
        self._seen = self._look()
        self.context, self._rules = self._load()

    @property
    def tcp(self) -> Port:
        """For whom the network lets through."""
        return Port(self, self.tls)

    @property
    def unix(self) -> Port:
        """For whom the file's mode lets through: nobody listens in between, so TLS is not required there."""
        return Port(self, Tls.OFFER if self.tls is Tls.REQUIRE else self.tls)

    def judge(self, peer: Peer | None, names: Iterable[str]) -> Access:
        """See nbd_server.access.Judge."""
        return self._rules(peer, names)

    def refresh(self, *, even_if_unchanged: bool = False) -> bool:
        """Read the files again if they have changed; whether something else is in force now."""
        seen = self._look()
        if seen == self._seen and not even_if_unchanged:
            return False
        self._seen = seen  # before they are read: what changes in between is seen the next time
        try:
            self.context, self._rules = self._load()
        except InvalidRequest as error:
            _log.error("files for TLS or access cannot be used: those before stay in force", error=str(error))
            return False
        _log.info("files for TLS and access were read anew", files=[str(each) for each in self._paths])
        return True

    def _look(self) -> Seen:
        return tuple(_seen(each) for each in self._paths)

    def _load(self) -> tuple[ssl.SSLContext | None, Judge]:
        settings = self._settings
        context = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            context = make_context(settings.tls_cert, settings.tls_key, settings.tls_ca)
        return context, anybody if settings.access is None else _read_rules(settings.access)


def _check(settings: FrontEndSettings) -> None:
    if settings.tls is Tls.NONE:
        given = [name for name in ("tls_cert", "tls_key", "tls_ca") if getattr(settings, name) is not None]
        if given:
            raise InvalidRequest(f"--{given[0].replace('_', '-')} needs --tls offer or --tls require")
    elif settings.tls_cert is None or settings.tls_key is None:
        raise InvalidRequest(f"--tls {settings.tls.value} needs --tls-cert and --tls-key: `cairn pki` makes them")
    if settings.access is not None and settings.tls_ca is None:
        raise InvalidRequest("--access needs --tls-ca: clients are known by their certificates")


def _read_rules(path: Path) -> Judge:
    try:
        return parse_rules(path.read_text(encoding="utf-8")).judge
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--access {path} cannot be read: {error}") from error
    except InvalidRequest as error:
        raise InvalidRequest(f"--access {path}: {error}") from error


def _seen(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
