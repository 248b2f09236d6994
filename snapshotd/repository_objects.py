"""The two kinds of objects that are stored in clear: `repository`, and the wrapped data keys in `keys/`.

Both are JSON: an object whose members stand in alphabetical order, in UTF-8, without spaces or line breaks. Its
member `sha256` is the SHA-256, in hexadecimal, of that same text without the member `sha256`: so a damaged object
is told from one of another key or of another release. Other than in this form the bytes are not accepted.

    repository   {"format":"cairn repository","owner":<cluster id>,"repository":<32 hex>,"sha256":<64 hex>,"version":1}
    keys/<32 hex, random>
                 {"check":<32 hex>,"domain":<32 hex>,"format":"cairn key","key":<key id>,"repository":<32 hex>,
                  "sha256":<64 hex>,"version":1,"wrapped":<base64>}

check: 16 bytes derived of the data key (snapshotd.crypto), by which a wrong one is told. wrapped: the blob of the
keyring (snapshotd.keyring, snapshotd.passphrase_keyring), whose context is "cairn key 1" and the 16 bytes each of
the repository's id and of the domain, without anything between.
"""

import base64
import binascii
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from blockstore.errors import Corrupt, InvalidRequest
from snapshotd.keyring import Wrapped

VERSION: Final = 1
REPOSITORY_KEY: Final = "repository"
KEYS_FOLDER: Final = "keys/"
ID_BYTES: Final = 16
#: Some hundred bytes are written; a key management service may give a larger blob.
_MAX_BYTES: Final = 64 << 10
_HEX: Final = re.compile(r"[0-9a-f]{32}")
_MAX_OWNER: Final = 200


@dataclass(frozen=True, slots=True)
class RepositoryObject:
    """id: 32 hexadecimal digits. owner: the cluster that may write to it."""

    id: str
    owner: str


@dataclass(frozen=True, slots=True)
class KeyObject:
    """The data key of one key domain (16 bytes), wrapped, for the repository with that id; check: 16 bytes."""

    repository: str
    domain: bytes
    check: bytes
    wrapped: Wrapped

    @property
    def context(self) -> bytes:
        return context_of(self.repository, self.domain)


def context_of(repository: str, domain: bytes) -> bytes:
    """What a wrapped data key is bound to."""
    return b"cairn key 1" + bytes.fromhex(repository) + domain


def encode_repository(repository: RepositoryObject) -> bytes:
    return _encode("cairn repository", {"repository": repository.id, "owner": repository.owner})


def decode_repository(stored: bytes, what: str) -> RepositoryObject:
    """`what` names it in errors. Raises Corrupt; InvalidRequest for a version that this release does not read."""
    members = _decode("cairn repository", stored, what)
    try:
        identity, owner = members["repository"], members["owner"]
        if not _HEX.fullmatch(identity) or not 0 < len(owner) <= _MAX_OWNER:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _damaged(what) from None
    return RepositoryObject(identity, owner)


def encode_key(key: KeyObject) -> bytes:
    members = {
        "repository": key.repository,
        "domain": key.domain.hex(),
        "check": key.check.hex(),
        "key": key.wrapped.key_id,
        "wrapped": base64.b64encode(key.wrapped.blob).decode(),
    }
    return _encode("cairn key", members)


def decode_key(stored: bytes, what: str) -> KeyObject:
    """`what` names it in errors. Raises Corrupt; InvalidRequest for a version that this release does not read."""
    members = _decode("cairn key", stored, what)
    try:
        for name in ("repository", "domain", "check"):
            if not _HEX.fullmatch(members[name]):
                raise ValueError
        wrapped = Wrapped(str(members["key"]), base64.b64decode(members["wrapped"], validate=True))
        domain, check = bytes.fromhex(members["domain"]), bytes.fromhex(members["check"])
        return KeyObject(members["repository"], domain, check, wrapped)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise _damaged(what) from None


def _encode(kind: str, members: dict[str, Any]) -> bytes:
    told = {**members, "format": kind, "version": VERSION}
    return _text({**told, "sha256": hashlib.sha256(_text(told)).hexdigest()})


def _text(members: dict[str, Any]) -> bytes:
    return json.dumps(members, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(kind: str, stored: bytes, what: str) -> dict[str, Any]:
    if len(stored) > _MAX_BYTES:
        raise Corrupt(f"{what} has {len(stored)} bytes, and none of us wrote more than {_MAX_BYTES}")
    try:
        members: dict[str, Any] = json.loads(stored)
        told = {name: value for name, value in members.items() if name != "sha256"}
        is_whole = members["sha256"] == hashlib.sha256(_text(told)).hexdigest() and _text(members) == stored
        found, version = members["format"], members["version"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise _damaged(what) from None
    if not is_whole or found != kind:
        raise _damaged(what)
    if version != VERSION:
        raise InvalidRequest(f"{what} has format version {version}, and this release reads {VERSION}: use a newer one")
    return members


def _damaged(what: str) -> Corrupt:
    return Corrupt(f"{what} is damaged: put it back from a copy of the object store")
