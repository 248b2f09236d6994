"""A keyring whose keys are made of passphrases, by scrypt (RFC 7914).

Nothing but the passphrase has to be kept: salt and cost lie in the wrapped key. What is read there is bounded
before it is believed, as a hostile object store could else ask for all memory of the machine.

The passphrases come from a file, one a line. The first is current; to rotate, put the new one above the old one,
rotate, and remove the old one.
"""

import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from blockstore.errors import InvalidRequest, NotFound
from snapshotd.keyring import KEY_BYTES, SEALED_KEY_BYTES, Wrapped, WrongKey, open_key, seal_key

_SALT_BYTES: Final = 16
#: "P", log2 of N, r, p, the salt; then what `seal_key` gives.
_HEADER: Final = struct.Struct(f">cBBB{_SALT_BYTES}s")
_MAX_FILE_BYTES: Final = 64 << 10
#: scrypt takes 128 * N * r bytes: at most this many, whatever a wrapped key says.
_MAX_MEMORY_BYTES: Final = 512 << 20
_MAX_P: Final = 16
_MIN_LOG2_N: Final = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """What a guess costs. The default takes 128 MiB and some 0.4 s (OWASP's recommendation)."""

    log2_n: int = 17
    r: int = 8
    p: int = 1

    def is_bearable(self) -> bool:
        """Whether it lies within what is worth trying; N = 2 ** log2_n."""
        small = _MIN_LOG2_N <= self.log2_n <= 24 and 1 <= self.r <= 32 and 1 <= self.p <= _MAX_P
        return small and 128 * self.r << self.log2_n <= _MAX_MEMORY_BYTES


class PassphraseKeyring:
    """Blob: one byte "P"; log2 of N, r and p, one byte each; salt (16 bytes); then what `seal_key` gives."""

    def __init__(self, passphrases: Sequence[str], *, cost: Cost | None = None, source: str = "the caller") -> None:
        """passphrases: the current one first. source: where they are from, for messages."""
        if not passphrases or not all(passphrases):
            raise InvalidRequest(f"there is no passphrase from {source}: write one in its first line")
        self._passphrases = [passphrase.encode() for passphrase in passphrases]
        self._cost = cost or Cost()
        if not self._cost.is_bearable():
            raise InvalidRequest(f"{self._cost} is outside the bounds: scrypt would take too much memory or too little")
        self.description = f"the passphrase from {source}"

    def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        salt = secrets.token_bytes(_SALT_BYTES)
        header = _HEADER.pack(b"P", self._cost.log2_n, self._cost.r, self._cost.p, salt)
        key = _derive(self._passphrases[0], salt, self._cost)
        return Wrapped("passphrase", header + seal_key(key, data_key, context))

    def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        for passphrase in self._passphrases:
            if (data_key := _opened(passphrase, wrapped, context)) is not None:
                return data_key
        raise WrongKey(f"{self.description} does not open the data key: it is not the one it was wrapped with")

    def is_current(self, wrapped: Wrapped, context: bytes) -> bool:
        try:
            return _opened(self._passphrases[0], wrapped, context) is not None
        except WrongKey:
            return False

    def add_key(self) -> None:
        raise InvalidRequest(
            f"{self.description} is in use already: write the new one in the line above it, and rotate again"
        )


def read_passphrases(path: Path, *, cost: Cost | None = None) -> PassphraseKeyring:
    """The keyring of a file's lines. Raises NotFound, and InvalidRequest where others may read it or it is empty."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            text = file.read(_MAX_FILE_BYTES).decode()
    except FileNotFoundError:
        raise NotFound(f"there is no passphrase file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the passphrase file {path}: {error}") from error
    if mode & 0o077:
        raise InvalidRequest(f"others may read the passphrase file {path} (mode {mode:03o}): run chmod 600 on it")
    lines = [line for line in text.splitlines() if line.strip()]
    return PassphraseKeyring(lines, cost=cost, source=str(path))


def _opened(passphrase: bytes, wrapped: Wrapped, context: bytes) -> bytes | None:
    if wrapped.blob[:1] != b"P" or len(wrapped.blob) != _HEADER.size + SEALED_KEY_BYTES:
        raise WrongKey(f"the data key is not wrapped by a passphrase, but by {wrapped.key_id}: give the keyring's file")
    _, log2_n, r, p, salt = _HEADER.unpack_from(wrapped.blob)
    cost = Cost(log2_n, r, p)
    if not cost.is_bearable():
        raise WrongKey(f"the data key asks for scrypt with {cost}: no release wrote that, and it is not tried")
    return open_key(_derive(passphrase, salt, cost), wrapped.blob[_HEADER.size :], context)


def _derive(passphrase: bytes, salt: bytes, cost: Cost) -> bytes:
    return Scrypt(salt=salt, length=KEY_BYTES, n=1 << cost.log2_n, r=cost.r, p=cost.p).derive(passphrase)
