"""Who may use which export: what is known of a client, what TLS is asked of it, and the rules. Pure.

Rules are read from a TOML file:

    [[rule]]
    client = "db-host"                # the common name of the client's certificate
    volumes = ["db", "db-log-*"]      # names or ids of volumes; * and ? stand for other characters

    [[rule]]
    subject = "CN=backup,O=Example"   # the whole subject, as RFC 4514 writes it
    volumes = ["*"]
    read_only = true

    [[rule]]
    tls = false                       # whoever comes without TLS, where that is allowed
    volumes = ["scratch"]

Where there are rules, nobody is let in without one. Of several that fit, the one that allows most counts. What a rule
means is looked up by every name that the volume is exported under, so a rule for its name is one for its id.
"""

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Any, Final

from blockstore.config import Tls
from blockstore.errors import InvalidRequest

_KEYS: Final = frozenset({"client", "subject", "tls", "volumes", "read_only"})


class Access(IntEnum):
    """What a client may do with an export; more is more."""

    NONE = 0
    READ = 1
    WRITE = 2


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of TLS: of its certificate; both are empty where none was asked for."""

    common_name: str = ""
    subject: str = ""


Judge = Callable[["Peer | None", Iterable[str]], Access]
"""What a client (None: one without TLS) may do with what is exported under these names, as of now."""


def anybody(_: Peer | None, names: Iterable[str]) -> Access:
    """Without rules: everybody may do everything."""
    return Access.WRITE


@dataclass(frozen=True, slots=True)
class Session:
    """What the server asks of one client, and knows of it. peer: None before TLS."""

    tls: Tls = Tls.NONE
    peer: Peer | None = None
    judge: Judge = anybody

    def access(self, names: Iterable[str]) -> Access:
        """What the client may do with an export of these names, now."""
        return self.judge(self.peer, names)

    @property
    def must_start_tls(self) -> bool:
        """Nothing is told before (NBD, "FORCEDTLS mode")."""
        return self.tls is Tls.REQUIRE and self.peer is None

    @property
    def may_start_tls(self) -> bool:
        return self.tls is not Tls.NONE and self.peer is None


@dataclass(frozen=True, slots=True)
class Rule:
    """One of a file. client, subject: whom it means; both empty: whoever comes without TLS."""

    client: str
    subject: str
    volumes: tuple[str, ...]
    access: Access

    def fits(self, peer: Peer | None, names: Iterable[str]) -> bool:
        return self._means(peer) and any(fnmatchcase(name, each) for each in self.volumes for name in names)

    def _means(self, peer: Peer | None) -> bool:
        if peer is None:
            return not self.client and not self.subject
        if self.client:
            return peer.common_name == self.client
        return bool(self.subject) and peer.subject == self.subject


@dataclass(frozen=True, slots=True)
class Rules:
    """All of a file."""

    rules: tuple[Rule, ...]

    def judge(self, peer: Peer | None, names: Iterable[str]) -> Access:
        """See Judge."""
        known = tuple(names)
        return max((rule.access for rule in self.rules if rule.fits(peer, known)), default=Access.NONE)


def parse_rules(text: str) -> Rules:
    """The rules in a TOML text. Raises InvalidRequest, with the number of the rule that is wrong."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"no TOML: {error}") from error
    found = document.get("rule", [])
    if set(document) - {"rule"} or not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidRequest("a file of rules has [[rule]] tables and nothing else")
    return Rules(tuple(_parse_rule(number, each) for number, each in enumerate(found, 1)))


def _parse_rule(number: int, table: Mapping[str, Any]) -> Rule:
    where = f"rule {number}"
    if unknown := set(table) - _KEYS:
        raise InvalidRequest(f"{where}: {min(unknown)!r} is no key of a rule: it has {', '.join(sorted(_KEYS))}")
    client, subject = _text(where, table, "client"), _text(where, table, "subject")
    without_tls = table.get("tls", True) is False
    if [bool(client), bool(subject), without_tls].count(True) != 1 or not isinstance(table.get("tls", True), bool):
        raise InvalidRequest(f"{where}: say whom it means by exactly one of client, subject and tls = false")
    volumes = table.get("volumes")
    if not isinstance(volumes, list) or not volumes or not all(isinstance(each, str) and each for each in volumes):
        raise InvalidRequest(f'{where}: volumes is a list of names or ids, such as ["db"]')
    read_only = table.get("read_only", False)
    if not isinstance(read_only, bool):
        raise InvalidRequest(f"{where}: read_only is true or false")
    return Rule(client, subject, tuple(volumes), Access.READ if read_only else Access.WRITE)


def _text(where: str, table: Mapping[str, Any], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str) or (key in table and not value):
        raise InvalidRequest(f"{where}: {key} is a text that is not empty")
    return value
