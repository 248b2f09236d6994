"""The keys that wrap data keys: where they are kept, and nothing else.

A repository's data key never changes and is stored wrapped, that is encrypted by a key of a keyring. Whoever
changes the wrapping key re-wraps a few bytes; the packs stay. A provider for a key management service is one more
class with the methods of `Keyring`: it sends `wrap` and `unwrap` there.

A wrapped key is bound to its context (the repository's id and the key domain): AES-256-GCM with the context as
additional data, so that it opens nowhere else. Who unwraps has checked the wrapped bytes against accidents before
(snapshotd.repository_objects); what fails here is told as WrongKey.

`FileKeyring` is a JSON file that only its owner can read, with several keys of which the last is current. A key's id
is made of the key, so that a damaged file is told from another key.
"""

import base64
import binascii
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from blockstore.durable_files import sync_path
from blockstore.errors import Corrupt, InvalidRequest, NotFound

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
SEALED_KEY_BYTES: Final = _NONCE_BYTES + KEY_BYTES + _TAG_BYTES
#: Rotations add a key each; a file with more was not written by us.
_MAX_FILE_BYTES: Final = 1 << 20
_FORMAT: Final = "cairn keyring"
_VERSION: Final = 1


class WrongKey(InvalidRequest):
    """No key at hand opens what is stored; the message says which key would."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A data key as it is stored. key_id: which key opens it; blob: for the keyring that made it to read."""

    key_id: str
    blob: bytes


class Keyring(Protocol):
    """Wraps data keys. Methods block: scrypt for half a second, a key management service for a request."""

    @property
    def description(self) -> str:
        """What and where it is, for people."""
        ...

    def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        """Encrypt a data key with the current key. Two results for one data key differ."""
        ...

    def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        """The data key. Raises WrongKey where no key here opens it, or the context is another."""
        ...

    def is_current(self, wrapped: Wrapped, context: bytes) -> bool:
        """Whether it opens with the key that `wrap` uses."""
        ...

    def add_key(self) -> None:
        """Have a new current key, durably; the others stay. Raises InvalidRequest where a person must bring it."""
        ...


def seal_key(wrapping_key: bytes, data_key: bytes, context: bytes) -> bytes:
    """nonce (12 bytes, random), ciphertext (32), tag (16)."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(wrapping_key).encrypt(nonce, data_key, context)


def open_key(wrapping_key: bytes, sealed: bytes, context: bytes) -> bytes | None:
    """What `seal_key` was given, or None where the key or the context is another."""
    try:
        return AESGCM(wrapping_key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except InvalidTag:
        return None


class FileKeyring:
    """Keys in a file. Every call reads it: another process may have added one.

    Blob: one byte "F", then what `seal_key` gives.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """create: make the file with one key where there is none. Raises NotFound, InvalidRequest, Corrupt."""
        self._path = path.absolute()
        if create and not self._path.exists():
            self._create()
        self._load()

    @property
    def description(self) -> str:
        return f"the keyring {self._path}"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, oldest first; the last is the current one."""
        return (*self._load(),)

    def wrap(self, data_key: bytes, context: bytes) -> Wrapped:
        key_id, key = list(self._load().items())[-1]
        return Wrapped(key_id, b"F" + seal_key(key, data_key, context))

    def unwrap(self, wrapped: Wrapped, context: bytes) -> bytes:
        keys = self._load()
        key = keys.get(wrapped.key_id)
        if key is None:
            raise WrongKey(
                f"the data key is wrapped by the key {wrapped.key_id}, and {self.description} has only "
                f"{', '.join(keys)}: use the keyring that has it, or its backup"
            )
        if wrapped.blob[:1] != b"F" or len(wrapped.blob) != 1 + SEALED_KEY_BYTES:
            raise WrongKey(f"the data key is not wrapped by a key of a file, as {self.description} has them")
        data_key = open_key(key, wrapped.blob[1:], context)
        if data_key is None:
            raise WrongKey(
                f"the key {wrapped.key_id} in {self.description} does not open the data key: it is another's"
            )
        return data_key

    def is_current(self, wrapped: Wrapped, context: bytes) -> bool:
        return wrapped.key_id == self.key_ids[-1]

    def add_key(self) -> None:
        with self._locked():
            self._store({**self._load(), **_new_key()})

    def retire(self, key_id: str) -> None:
        """Remove a key that is not the current one. What it alone opens, such as an old copy of a bucket, is lost."""
        with self._locked():
            keys = dict(self._load())
            if key_id not in keys:
                raise NotFound(f"{self.description} has no key {key_id}: it has {', '.join(keys)}")
            if key_id == list(keys)[-1]:
                raise InvalidRequest(f"{key_id} is the current key of {self.description}: rotate first")
            del keys[key_id]
            self._store(keys)

    def _create(self) -> None:
        with self._locked():
            if not self._path.exists():
                self._store(_new_key())

    def _load(self) -> Mapping[str, bytes]:
        try:
            with open(self._path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode & 0o777
                text = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise NotFound(f"there is no keyring at {self._path}: restore it from its backup") from None
        except OSError as error:
            raise InvalidRequest(f"cannot read {self.description}: {error.strerror}") from error
        if mode & 0o077:
            raise InvalidRequest(f"others may read {self.description} (mode {mode:03o}): run chmod 600 on it")
        return _parse(text, self.description)

    def _store(self, keys: Mapping[str, bytes]) -> None:
        """Replace the file in one step, durably."""
        members = [{"id": key_id, "key": base64.b64encode(key).decode()} for key_id, key in keys.items()]
        text = json.dumps({"format": _FORMAT, "version": _VERSION, "keys": members}, indent=2) + "\n"
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_path(self._path.parent)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, in whatever process: the directory is locked, as the file itself is replaced."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InvalidRequest(f"cannot write {self.description}: {error.strerror}") from error


def _new_key() -> dict[str, bytes]:
    key = secrets.token_bytes(KEY_BYTES)
    return {_id_of(key): key}


def _id_of(key: bytes) -> str:
    """64 bits of a hash of 256 random bits: they say nothing about the others."""
    return f"key-{hashlib.sha256(b'cairn keyring' + key).hexdigest()[:16]}"


def _parse(text: bytes, description: str) -> Mapping[str, bytes]:
    """The keys in a keyring's file, in their order. Raises Corrupt; InvalidRequest for a version from the future."""
    damaged = Corrupt(f"{description} is damaged: restore it from its backup")
    try:
        content: dict[str, Any] = json.loads(text)
        if content["format"] != _FORMAT:
            raise damaged
        if content["version"] != _VERSION:
            raise InvalidRequest(
                f"{description} has version {content['version']}, and this release reads {_VERSION}: use a newer one"
            )
        keys = {str(member["id"]): base64.b64decode(member["key"], validate=True) for member in content["keys"]}
    except (ValueError, TypeError, KeyError, binascii.Error):
        raise damaged from None
    if not keys or any(len(key) != KEY_BYTES or _id_of(key) != key_id for key_id, key in keys.items()):
        raise damaged
    return keys
