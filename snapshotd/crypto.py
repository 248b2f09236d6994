"""The keys of one key domain, and what is sealed with them.

A domain has one data key; whatever else is needed comes out of it by HKDF-SHA256 (RFC 5869) with a label for each
purpose and, for objects, the object's random salt. So each object is encrypted under a key of its own, used
once: the nonces may be counters, and a nonce is never used twice as long as no salt is. A salt is 16 fresh
random bytes from whoever writes the object, also when the same content is written again after a crash.

Everything is AES-256-GCM. The additional data is the 8-byte header (magic, kind, version), the domain and what the
object must be, so that none passes for another. Source: docs/format.md, "Keys", "Sealed objects".
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from blockstore.errors import Corrupt
from blockstore.units import BLOCK_SIZE

VERSION: Final = 1
"""Of every kind. A reader refuses what has another one."""

DOMAIN_SIZE: Final = 16
KEY_SIZE: Final = 32
SALT_SIZE: Final = 16
HASH_SIZE: Final = 16
NAME_SIZE: Final = 32
TAG_SIZE: Final = 16
HEADER_SIZE: Final = 8

_MAGIC: Final = b"cairn"
_FIRST_NONCE: Final = bytes(12)
#: Where a sealed object's text in clear begins, with its length.
_TOLD_AT: Final = HEADER_SIZE + SALT_SIZE
SEALED_SIZE: Final = _TOLD_AT + 1 + TAG_SIZE
"""Of a sealed object with nothing in it."""


class Kind(Enum):
    """What an object or a part of one is; the value is its letter in the header."""

    FRAME = b"F"
    TRAILER = b"T"
    INDEX = b"I"
    SHARD = b"S"
    ROOT = b"R"
    QUARANTINE = b"Q"

    @property
    def word(self) -> str:
        return self.name.lower()

    @property
    def header(self) -> bytes:
        """The 8 bytes that name the kind and its version."""
        return _MAGIC + self.value + VERSION.to_bytes(2, "little")


@dataclass(frozen=True, slots=True)
class FrameCipher:
    """For the frames of one pack. Whoever makes the pack encrypts under each number once, and under no number twice."""

    aead: AESGCM
    prefix: bytes

    def encrypt(self, number: int, body: bytes) -> bytes:
        """The stored frame: the ciphertext of `body` and the tag."""
        return self.aead.encrypt(number.to_bytes(12, "little"), body, self.prefix + number.to_bytes(4, "little"))

    def decrypt(self, number: int, stored: bytes | memoryview) -> bytes:
        """The body of a stored frame. Raises cryptography's InvalidTag."""
        return self.aead.decrypt(number.to_bytes(12, "little"), stored, self.prefix + number.to_bytes(4, "little"))


class DomainKeys:
    """All keys of one domain. It is safe to use from several threads.

    domain: 16 bytes that name the domain, no secret. data_key: 32 random bytes, the secret.
    """

    def __init__(self, domain: bytes, data_key: bytes) -> None:
        if len(domain) != DOMAIN_SIZE or len(data_key) != KEY_SIZE:
            raise ValueError(f"a domain of {len(domain)} and a key of {len(data_key)} bytes: {DOMAIN_SIZE}, {KEY_SIZE}")
        self.domain: Final = domain
        self._data_key = data_key
        self._dedupe_key = self._derive(domain, "dedupe")
        self.hash_of_zeroes: Final = self.block_hash(bytes(BLOCK_SIZE))
        """`block_hash` of a block of zeroes."""

    def __repr__(self) -> str:
        return f"DomainKeys(domain={self.domain.hex()})"

    @property
    def check_value(self) -> bytes:
        """16 bytes that tell this data key from another, and nothing about it: kept in clear beside the wrapped key."""
        return self._derive(self.domain, "check")[:16]

    def block_hash(self, block: bytes | memoryview) -> bytes:
        """The 16-byte keyed BLAKE3 of a block's content: what deduplication goes by. Never stored in clear."""
        return self.block_hashes((block,))[0]

    def block_hashes(self, blocks: Iterable[bytes | memoryview]) -> list[bytes]:
        """`block_hash` of each."""
        key = self._dedupe_key
        return [blake3(block, key=key).digest(HASH_SIZE) for block in blocks]

    def frame_cipher(self, salt: bytes) -> FrameCipher:
        """What encrypts and decrypts the frames of the pack whose id is `salt`."""
        if len(salt) != SALT_SIZE:
            raise ValueError(f"a salt of {len(salt)} bytes: {SALT_SIZE} are needed")
        return FrameCipher(AESGCM(self._derive(salt, "frame")), Kind.FRAME.header + self.domain + salt)

    def seal(self, kind: Kind, context: bytes, plaintext: bytes, salt: bytes, clear: bytes = b"") -> bytes:
        """The sealed object: header (8), salt (16), the length of `clear` (1), `clear`, ciphertext, tag (16).

        context: what the object is bound to and what its reader knows without it. clear: what it is bound to as well,
        at most 255 bytes that everybody may read. salt: 16 random bytes, never used before.
        """
        if len(salt) != SALT_SIZE:
            raise ValueError(f"a salt of {len(salt)} bytes: {SALT_SIZE} are needed")
        aead = AESGCM(self._derive(salt, kind.word))
        told = len(clear).to_bytes(1, "little") + clear
        ciphertext = aead.encrypt(_FIRST_NONCE, plaintext, kind.header + self.domain + told + context)
        return kind.header + salt + told + ciphertext

    def open(self, kind: Kind, context: bytes, stored: bytes, what: str) -> bytes:
        """The plaintext of a sealed object; `what` names it in errors, `clear_of` gives what it says in clear.

        Raises Corrupt where it is not of this kind and version, was changed, is bound to another context, or was
        sealed under another data key.
        """
        check_header(kind, stored, what)
        told = stored[_TOLD_AT : _TOLD_AT + 1] + clear_of(stored)
        ciphertext = stored[_TOLD_AT + len(told) :]
        if len(ciphertext) < TAG_SIZE:
            raise Corrupt(f"{what} is cut short: {len(stored)} bytes")
        try:
            aead = AESGCM(self._derive(stored[HEADER_SIZE:_TOLD_AT], kind.word))
            return aead.decrypt(_FIRST_NONCE, ciphertext, kind.header + self.domain + told + context)
        except InvalidTag as error:
            raise Corrupt(f"{what} fails its authentication: it was changed, or belongs elsewhere") from error

    def _derive(self, salt: bytes, label: str) -> bytes:
        return HKDF(SHA256(), KEY_SIZE, salt, b"cairn/1/" + label.encode()).derive(self._data_key)


def clear_of(stored: bytes) -> bytes:
    """What a sealed object says in clear: to be believed only once `DomainKeys.open` has opened it."""
    length = int.from_bytes(stored[_TOLD_AT : _TOLD_AT + 1], "little")
    return stored[_TOLD_AT + 1 : _TOLD_AT + 1 + length]


def check_header(kind: Kind, stored: bytes, what: str) -> None:
    """Raises Corrupt unless `stored` begins with the header of `kind` in a version that this code reads."""
    header = stored[:HEADER_SIZE]
    if header == kind.header:
        return
    if header[: len(_MAGIC) + 1] == kind.header[: len(_MAGIC) + 1] and len(header) == HEADER_SIZE:
        version = int.from_bytes(header[-2:], "little")
        raise Corrupt(f"{what} has version {version} of its format, and this Cairn reads {VERSION}: use a newer Cairn")
    raise Corrupt(f"{what} is no {kind.word}: it begins with {header!r}")


def name_of(stored: bytes) -> str:
    """The name of an object that is named by its content: the SHA-256 of its bytes, in hexadecimal."""
    return hashlib.sha256(stored).hexdigest()


def raw_name(name: str) -> bytes:
    """The 32 bytes of a name, as objects hold it. Raises ValueError where it is none."""
    raw = bytes.fromhex(name)
    if raw.hex() != name or len(raw) != NAME_SIZE:
        raise ValueError(f"{name!r} is no name of an object: {2 * NAME_SIZE} lower-case hexadecimal digits")
    return raw


def check_name(name: str, stored: bytes, what: str) -> None:
    """Raises Corrupt unless `stored` is what the object of that name was when it was written."""
    if name_of(stored) != name:
        raise Corrupt(f"{what} does not match its name: its {len(stored)} bytes were changed, or are another object's")
