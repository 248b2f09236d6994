"""Opens the object store and the keyring that the settings name, and tries them before anybody relies on them.

    /srv/cairn, file:///srv/cairn   a directory (snapshotd.local_store)
    s3://bucket/prefix              S3 (snapshotd.s3_store)
    memory://                       this process's memory, for tests

Around the store come time limits and retries (snapshotd.retrying); a throttle (snapshotd.throttle) goes around
those, by whoever has one, so that waiting for its turn counts against no time limit.
"""

from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog

from blockstore.errors import InvalidRequest
from snapshotd.keyring import FileKeyring, Keyring
from snapshotd.local_store import LocalStore
from snapshotd.measured_store import MeasuredStore, StoreRequests
from snapshotd.memory_store import MemoryStore
from snapshotd.object_store import ObjectStore
from snapshotd.passphrase_keyring import read_passphrases
from snapshotd.retrying import Retrying, RetryLimits
from snapshotd.s3_store import S3Store
from snapshotd.store_probe import check_access, has_one_winner
from snapshotd.store_settings import StoreSettings

_log: Final = structlog.get_logger(__name__)


async def open_store(settings: StoreSettings, requests: StoreRequests | None = None) -> ObjectStore:
    """The store, after it has shown that it can be listed, written, read and deleted from.

    requests: where all that it is asked is noted; None: nowhere.
    Raises InvalidRequest for an address, a bucket, a credential or a region that it refuses, and QuorumUnavailable
    where it does not answer within `open_limit_s`.
    """
    made = _make(settings)
    inner: ObjectStore = made if requests is None else MeasuredStore(made, requests)
    try:
        await _try_out(inner, made, settings)
    except BaseException:
        await inner.close()
        raise
    return Retrying(inner, RetryLimits(settings.request_timeout_s, settings.retries, settings.retry_limit_s))


def open_keyring(settings: StoreSettings, *, create: bool = False) -> Keyring:
    """The keyring of the settings; create: make its file where there is none. Blocking."""
    if settings.passphrase_file is not None:
        return read_passphrases(settings.passphrase_file)
    if settings.keyring is None:
        raise InvalidRequest("neither a keyring nor a passphrase file is named: snapshots are always encrypted")
    return FileKeyring(settings.keyring, create=create)


def _make(settings: StoreSettings) -> ObjectStore:
    parts = urlsplit(settings.url)
    match parts.scheme:
        case "memory":
            return MemoryStore()
        case "s3":
            return S3Store(settings)
        case "":
            return LocalStore(Path(settings.url))
        case "file" if parts.netloc in ("", "localhost") and parts.path:
            return LocalStore(Path(unquote(parts.path)))
    raise InvalidRequest(f"a {parts.scheme} address names no object store: write a directory, or s3://bucket/prefix")


async def _try_out(inner: ObjectStore, made: ObjectStore, settings: StoreSettings) -> None:
    """made: what is behind `inner`."""
    trying: ObjectStore = Retrying(
        inner, RetryLimits(settings.request_timeout_s, settings.retries, settings.open_limit_s)
    )
    await check_access(trying)
    if isinstance(made, S3Store):
        made.conditional_put = await has_one_winner(trying)
        if not made.conditional_put:
            _log.warning(
                "this server's conditional put is no promise: two clusters could claim one store", store=inner.url
            )
