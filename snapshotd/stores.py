"""Opens the object store and the keyring that the settings name, and tries them before anybody relies on them.

    /srv/cairn, file:///srv/cairn   a directory (snapshotd.local_store)
    s3://bucket/prefix              S3 (snapshotd.s3_store)
    memory://                       this process's memory, for tests

Around the store come time limits and retries (snapshotd.retrying); a throttle (snapshotd.throttle) goes around
those, by whoever has one, so that waiting for its turn counts against no time limit.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from blockstore.errors import InvalidRequest
from snapshotd.keyring import FileKeyring, Keyring
from snapshotd.local_store import LocalStore
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import ObjectStore
from snapshotd.passphrase_keyring import read_passphrases
from snapshotd.retrying import Retrying, RetryLimits
from snapshotd.store_settings import StoreSettings


async def open_store(settings: StoreSettings) -> ObjectStore:
    """The store, after it has shown that it can be listed, written, read and deleted from.

    Raises InvalidRequest for an address, a bucket, a credential or a region that it refuses, and QuorumUnavailable
    where it does not answer within `open_limit_s`.
    """
    inner = await _make(settings)
    limits = RetryLimits(settings.request_timeout_s, settings.retries, settings.retry_limit_s)
    return Retrying(inner, limits)


def open_keyring(settings: StoreSettings, *, create: bool = False) -> Keyring:
    """The keyring of the settings; create: make its file where there is none. Blocking."""
    if settings.passphrase_file is not None:
        return read_passphrases(settings.passphrase_file)
    if settings.keyring is None:
        raise InvalidRequest("neither a keyring nor a passphrase file is named: snapshots are always encrypted")
    return FileKeyring(settings.keyring, create=create)


async def _make(settings: StoreSettings) -> ObjectStore:
    parts = urlsplit(settings.url)
    match parts.scheme:
        case "memory":
            return MemoryStore()
        case "":
            return LocalStore(Path(settings.url))
        case "file" if parts.netloc in ("", "localhost") and parts.path:
            return LocalStore(Path(unquote(parts.path)))
    raise InvalidRequest(f"{settings.url!r} is no address of an object store: write a directory, or s3://bucket/prefix")
